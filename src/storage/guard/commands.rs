//! Commands that a machine runs by itself: in scripts, tables of cron, services and rules of udev. Those that are nt's own
//! are for drives that may be used so; the others are left, for the words of a drive to be looked for.

/// Scripts that are nt's own, by name.
const SCRIPTS: [&str; 2] = ["bind-vfio.sh", "release-vfio.sh"];
/// What nt may be told to do with a drive.
const NTS: [&str; 13] = [
    "bench",
    "chat",
    "device",
    "inspect",
    "list",
    "logits",
    "perplexity",
    "plan",
    "probe",
    "run",
    "serve",
    "stage",
    "verify",
];
/// Options of nt that may stand before what it is told to do, by their beginnings.
const OPTIONS: [&str; 4] = ["-v", "-q", "--verbose", "--quiet"];
/// Keys of a service that have a file system mounted for it.
const IMAGES: [&str; 3] = ["RootImage", "MountImages", "ExtensionImages"];

/// Commands of a script of a shell that name a device and are not nt's, a line each.
pub fn of_script(text: &str) -> String {
    joined(text, &['#'], false).iter().flat_map(|line| others(line)).collect::<Vec<_>>().join("\n")
}

/// Commands of a table of cron that name a device and are not nt's, a line each. Its lines go on nowhere, and `%` ends a
/// command: what follows is its input.
pub fn of_cron(text: &str) -> String {
    let lines = text.lines().filter(|l| !l.trim_start().starts_with('#'));
    let text: String = lines.map(|l| l.replace("\\%", " ").replace('%', ";") + "\n").collect();
    text.lines().flat_map(others).collect::<Vec<_>>().join("\n")
}

/// Commands of a service that name a device and are not nt's, and images that are mounted for it, a line each.
pub fn of_service(text: &str) -> String {
    let mut found = Vec::new();
    for line in joined(text, &['#', ';'], true) {
        let Some((key, value)) = line.split_once('=') else { continue };
        if IMAGES.contains(&key.trim()) {
            found.push(value.to_owned());
        } else if key.trim_start().starts_with("Exec") {
            // Some services have several commands in a line.
            let commands = value.split(" ; ").filter(|c| {
                let program =
                    c.trim_start().trim_start_matches(['@', '-', ':', '+', '!', '|']).split_whitespace().next();
                names(c) && !program.is_some_and(|p| last(p) == "nt" || SCRIPTS.contains(&last(p)))
            });
            found.extend(commands.map(str::to_owned));
        }
    }
    found.join("\n")
}

/// The rules of udev that have something done with the devices that they name, or give them to a user or group, a line
/// each; and those that jump, where any other does.
pub fn of_rules(text: &str) -> String {
    let mut lines = joined(text, &['#'], true);
    let jumps = lines.iter().any(|l| is_used(l));
    lines.retain(|l| is_used(l) || jumps && l.contains("GOTO"));
    lines.join("\n")
}

fn is_used(rule: &str) -> bool {
    let rule: &str = &rule.replace(char::is_whitespace, "");
    let starts =
        ["RUN+=", "RUN=", "RUN:=", "RUN{", "PROGRAM", "IMPORT{program}", "SYSTEMD_WANTS", "SYSTEMD_USER_WANTS"];
    let given = |key: &str, usual: &[&str]| values(rule, key).any(|v| !usual.contains(&v));
    starts.iter().any(|w| rule.contains(w))
        || given("OWNER", &["root", "0"])
        || given("GROUP", &["root", "0", "disk", "6"])
        || values(rule, "MODE").any(|v| v.ends_with(['2', '3', '6', '7']))
}

/// What a rule assigns to a key.
fn values<'a>(rule: &'a str, key: &str) -> impl Iterator<Item = &'a str> {
    rule.match_indices(key).filter_map(move |(at, _)| {
        let rest = rule[at + key.len()..].trim_start_matches([':', '+']).strip_prefix("=\"")?;
        rest.split('"').next()
    })
}

/// Lines, those joined that end with a backslash. A comment ends with its line and is left out, within a line that goes on
/// too if `within`.
fn joined(text: &str, comments: &[char], within: bool) -> Vec<String> {
    let (mut out, mut line) = (Vec::new(), String::new());
    let mut goes_on = false;
    for part in text.lines() {
        if (within || !goes_on) && part.trim_start().starts_with(comments) {
            continue;
        }
        goes_on = part.ends_with('\\');
        line.push_str(part.strip_suffix('\\').unwrap_or(part));
        if goes_on {
            line.push(' ');
        } else {
            out.push(std::mem::take(&mut line));
        }
    }
    out.push(line);
    out
}

/// Commands of a line of a shell that name a device and are not nt's. What stands before a program (the times of cron,
/// `sudo`) may be anything. Of those that are nt's, where their output goes, and commands within them.
fn others(line: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for command in line.split([';', '&', '|']) {
        if !is_nts(command) {
            found.push(command);
            continue;
        }
        found.extend(command.split('>').skip(1).filter_map(|to| to.split_whitespace().next()));
        found.extend(command.split('(').skip(1).filter_map(|inner| inner.split(')').next()));
        found.extend(command.split('`').skip(1).step_by(2));
    }
    found.retain(|c| names(c));
    found
}

/// Whether a command may name a device: by a path, a tag, an option of `mount`, or an address for another driver.
fn names(command: &str) -> bool {
    let lower = command.to_ascii_lowercase();
    ["/dev/", "uuid", "label", "vfio", "unbind", "driver_override", "driverctl"].iter().any(|w| lower.contains(w))
        || command.split_whitespace().any(|w| w.starts_with("-U") || w.starts_with("-L"))
}

/// Whether a command is nt's: its program, or one of its scripts, stands before any device. A folder or a label may have
/// nt's name too (`mount /dev/x /mnt/nt`), so what it is told to do must follow.
fn is_nts(command: &str) -> bool {
    let words: Vec<&str> = command.split_whitespace().take_while(|w| !w.contains("/dev/")).collect();
    words.iter().any(|w| SCRIPTS.contains(&last(w)))
        || words.iter().enumerate().any(|(i, w)| {
            let told = words[i + 1..].iter().find(|w| !OPTIONS.iter().any(|o| w.starts_with(o)));
            last(w) == "nt" && told.is_some_and(|told| NTS.contains(told))
        })
}

/// The last part of a path.
fn last(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}
