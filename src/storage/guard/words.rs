//! Finds a drive in the text of a table: by its identifiers, read from the drive itself, by the
//! numbers of nodes that paths lead to, and by the spelling of paths that lead nowhere now.
//!
//! One reader serves every table. It takes each line apart in all the ways that programs do (quotes,
//! `\040`, `\x20`, `%20`, entities of XML, escapes of JSON, keys before `=`, lists) and asks of each part
//! whether it means the drive. A part too many costs a sentence to the user; one too few a drive.

use std::collections::BTreeSet;

use super::host::{Host, Unreadable};
use super::node::Number;
use super::nodes::Nodes;
use super::superblocks::{Said, Sort};
use super::sysfs::Controller;
use super::{identity, partitions};

/// Identifiers with at least as many letters and digits are looked for inside of words.
const LONG: usize = 16;
/// Bytes of the longest path.
const NAME_MAX: usize = 4096;
/// Where links to devices lie, and the sort of name they carry.
const LINKS: [(&str, &[Sort]); 6] = [
    ("/by-uuid/", &[Sort::Uuid]),
    ("/by-label/", &[Sort::Label]),
    ("/by-partuuid/", &[Sort::PartUuid]),
    ("/by-partlabel/", &[Sort::PartLabel]),
    ("/by-id/", &[]),
    ("/by-path/", &[]),
];
/// Tags before a name in tables.
const TAGS: [(&str, &[Sort]); 8] = [
    ("UUID", &[Sort::Uuid, Sort::PartUuid]),
    ("LABEL", &[Sort::Label]),
    ("PARTUUID", &[Sort::PartUuid]),
    ("PARTLABEL", &[Sort::PartLabel]),
    ("ID", &[Sort::Id]),
    ("ZFS", &[Sort::Pool]),
    ("name", &[Sort::Array]),
    ("rd.lvm.vg", &[Sort::Group]),
];

/// An identifier and the device that carries it.
#[derive(Debug, Clone)]
struct Known {
    device: String,
    said: Said,
    /// Lower case, letters and digits only.
    bare: String,
}

/// Everything by which tables may mean a drive.
#[derive(Debug)]
pub struct Words {
    known: Vec<Known>,
    nodes: Nodes,
    /// `pci-0000:02:00.0-nvme`, the start of links below `by-path`.
    path: String,
    bdf: String,
    first: String,
}

/// What a table says of a drive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mention {
    /// The device.
    pub device: String,
    /// The word that means it.
    pub word: String,
}

impl Words {
    /// The words for `controller`, of whose devices `said` was read.
    pub fn new(host: &Host, controller: &Controller, said: Vec<(String, Said)>) -> Result<Self, Unreadable> {
        let first = controller.namespaces.first().map_or(&controller.bdf, |n| &n.whole.name).clone();
        let mut all = said;
        if !identity::is_bogus(&controller.serial) {
            all.push((first.clone(), Said { sort: Sort::Id, text: controller.serial.clone() }));
        }
        for namespace in &controller.namespaces {
            let ids = namespace.trusted_ids().map(|(_, id)| id.to_owned());
            let wwid = host.read_if_there(&format!("/sys/class/block/{}/wwid", namespace.whole.name))?;
            // "eui." and "nvme." stand before what must not be a number that means nothing.
            let wwid = wwid.filter(|w| !identity::is_bogus(w.split_once('.').map_or(w.as_str(), |(_, id)| id)));
            for text in ids.chain(wwid) {
                all.push((namespace.whole.name.clone(), Said { sort: Sort::Id, text }));
            }
        }
        let known = all.into_iter().filter(|(_, s)| !s.text.trim().is_empty());
        Ok(Self {
            known: known.map(|(device, said)| Known { device, bare: bare(&said.text), said }).collect(),
            nodes: Nodes::of(host, controller)?,
            path: format!("pci-{}-nvme", controller.bdf),
            bdf: controller.bdf.clone(),
            first,
        })
    }

    /// Every mention of the drive in `text`, one a device and word. Lines that begin with one of `comments`
    /// are comments.
    pub fn mentions(&self, host: &Host, text: &str, comments: &[char]) -> Result<Vec<Mention>, Unreadable> {
        let mut found: Vec<Mention> = Vec::new();
        let is_comment = |l: &str| l.trim_start().starts_with(comments);
        for line in text.lines().filter(|l| !is_comment(l)) {
            for mention in self.line(host, line)? {
                if !found.contains(&mention) {
                    found.push(mention);
                }
            }
        }
        Ok(found)
    }

    /// Mentions in the bytes of a file that is no text: strings, and numbers of pools.
    pub fn in_bytes(&self, host: &Host, bytes: &[u8]) -> Result<Vec<Mention>, Unreadable> {
        let text: String = bytes.iter().map(|b| if b.is_ascii_graphic() { char::from(*b) } else { '\n' }).collect();
        let mut found = self.mentions(host, &text, &[])?;
        let strings: Vec<&str> = text.split('\n').filter(|s| s.len() > 4).collect();
        for known in &self.known {
            let number = (known.said.sort == Sort::PoolNumber).then(|| known.said.text.parse::<u64>().ok()).flatten();
            let number = number.is_some_and(|n| bytes.windows(8).any(|w| w == n.to_be_bytes()));
            // A length before a string may look like a letter of it.
            let name = known.said.sort == Sort::Pool && text.split('\n').any(|s| s == known.said.text);
            if number || name {
                found.push(known.mention());
            }
        }
        for string in strings {
            // What ZFS keeps in `devid` and `phys_path`, and nodes behind the length of the string.
            for (start, folder) in [("nvme", "/by-id/"), ("wwn", "/by-id/"), ("pci-", "/by-path/"), ("/dev/", "")] {
                let Some(at) = string.find(start) else { continue };
                let word = format!("{folder}{}", &string[at..]);
                let device = self.nodes.spelled(&word).map(str::to_owned).or(self.link(&word));
                found.extend(device.map(|device| Mention { device, word }));
            }
        }
        Ok(found)
    }

    fn line(&self, host: &Host, line: &str) -> Result<Vec<Mention>, Unreadable> {
        let mut found = Vec::new();
        let lines = decoded(line);
        for line in &lines {
            let bare_line = bare(line);
            let lower = line.to_lowercase();
            for known in self.known.iter().filter(|k| k.said.sort.is_unique()) {
                let inside = known.bare.len() >= LONG && bare_line.contains(&known.bare);
                if inside || known.stands_alone() && alone(&lower, &known.said.text.to_lowercase()) {
                    found.push(known.mention());
                }
            }
            self.pci(&lower, &mut found);
        }
        let mut all: BTreeSet<String> = lines.iter().flat_map(|l| parts(l)).collect();
        // An escaped blank does not end a word.
        if lines.len() > 1 {
            all.extend(parts(line).iter().flat_map(|part| decoded(part)));
        }
        let is_zfs = line.to_ascii_lowercase().contains("zfs");
        for part in &all {
            found.extend(self.part(host, part, is_zfs)?);
        }
        // `root=10b0b`, `resume=0x10b0b`: one hexadecimal number of the kernel.
        for value in all.iter().filter_map(|p| p.strip_prefix("root=").or(p.strip_prefix("resume="))) {
            let name = hex_number(value).and_then(|n| self.nodes.block(n));
            found.extend(name.map(|device| Mention { device: device.to_owned(), word: value.to_owned() }));
        }
        // `search --label NAME` of GRUB, `mount -L NAME`.
        let words: Vec<&str> = line.split_whitespace().map(|w| w.trim_matches(['"', '\''])).collect();
        if words.iter().any(|w| matches!(*w, "--label" | "-L" | "-l")) {
            let labels = self.known.iter().filter(|k| k.said.sort == Sort::Label);
            found.extend(labels.filter(|k| words.contains(&k.said.text.as_str())).map(Known::mention));
        }
        Ok(found)
    }

    /// A PCI address, which gives the whole drive to a guest or to another driver: `0000:02:00.0`, `02:00.0`, or
    /// `02:00` for all functions; or as libvirt writes it (`domain='0x0000' bus='0x02' slot='0x00' function='0x0'`),
    /// where addresses inside of a guest have a type.
    fn pci(&self, line: &str, found: &mut Vec<Mention>) {
        // Without a function or a domain it may be a time of the day.
        let short = ["pci", "host"].iter().any(|word| line.contains(word));
        for word in line.split(|c: char| !(c.is_ascii_hexdigit() || c == ':' || c == '.')) {
            let word = word.trim_matches('.');
            if pci_address(word, short).is_some_and(|a| self.bdf == a || self.bdf.starts_with(&format!("{a}."))) {
                found.push(Mention { device: self.first.clone(), word: word.to_owned() });
            }
        }
        for element in line.split('<').filter(|e| e.starts_with("address ") && !e.contains("type=")) {
            let field = |name: &str| {
                let value = element.split_once(&format!("{name}="))?.1.trim_start_matches(['"', '\'']);
                let digits = value.trim_start_matches("0x");
                let end = digits.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(digits.len());
                u32::from_str_radix(&digits[..end], 16).ok()
            };
            let (Some(bus), Some(slot), Some(function)) = (field("bus"), field("slot"), field("function")) else {
                continue;
            };
            let address = format!("{:04x}:{bus:02x}:{slot:02x}.{function:x}", field("domain").unwrap_or(0));
            if address == self.bdf {
                found.push(Mention { device: self.first.clone(), word: address });
            }
        }
    }

    /// Whether one part of a line means the drive.
    fn part(&self, host: &Host, part: &str, is_zfs: bool) -> Result<Option<Mention>, Unreadable> {
        let ours = |device: &str| Some(Mention { device: device.to_owned(), word: part.to_owned() });
        if let Some((tag, value)) = part.split_once('=')
            && let Some((_, sorts)) = TAGS.iter().find(|(t, _)| t.eq_ignore_ascii_case(tag))
            && let Some(known) = self.named(value, sorts)
        {
            return Ok(ours(&known.device));
        }
        // The number of a device, as `root=` may have it.
        if let Some(name) = pairs(part).into_iter().find_map(|n| self.nodes.block(n)) {
            return Ok(ours(name));
        }
        let node = part.strip_prefix("/dev/").unwrap_or(part).trim_start_matches('/');
        if !node.contains('/')
            && let Some(name) = self.nodes.spelled(node)
        {
            return Ok(ours(name));
        }
        if part.starts_with('/') && part.len() > 1 {
            match self.nodes.at(host, part) {
                Ok(Some(name)) => return Ok(ours(name)),
                // A folder of somebody else's file system may not be entered, not even by root.
                Err(e) if part.starts_with("/dev/") => return Err(e),
                _ => {}
            }
            return Ok(self.link(part).and_then(|device| ours(&device)));
        }
        // A volume of a group that is not active, a data set of a pool that is not imported.
        let first = part.split('/').next().unwrap_or("");
        let is = |sort| self.known.iter().find(move |k: &&Known| k.said.sort == sort && k.said.text == first);
        let volume = part.contains('/');
        let known = is(Sort::Pool).filter(|_| volume || is_zfs).or(is(Sort::Group).filter(|_| volume));
        Ok(known.and_then(|k| ours(&k.device)))
    }

    /// The device of a link that need not be there now.
    fn link(&self, path: &str) -> Option<String> {
        let device = |k: &Known| k.device.clone();
        for (folder, sorts) in LINKS {
            let Some((_, name)) = path.split_once(folder) else { continue };
            if let Some(known) = self.named(name, sorts) {
                return Some(device(known));
            }
            // udev makes `nvme-MODEL_SERIAL`, `nvme-eui.…` and the like.
            if sorts.is_empty() && name.starts_with(&self.path) {
                return Some(self.first.clone());
            }
            if sorts.is_empty() && (name.starts_with("nvme") || name.starts_with("wwn")) {
                let mut ids = self.known.iter().filter(|k| k.said.sort == Sort::Id);
                return ids.find(|k| contains(&underscored(name), &underscored(&k.said.text))).map(device);
            }
        }
        let by = |sort| self.known.iter().filter(move |k| k.said.sort == sort);
        let doubled = |name: &str| name.replace('-', "--");
        let group = by(Sort::Group).find(|k| {
            path.starts_with(&format!("/dev/{}/", k.said.text))
                || path.starts_with(&format!("/dev/mapper/{}-", doubled(&k.said.text)))
        });
        let array = by(Sort::Array).find(|k| {
            let short = k.said.text.rsplit(':').next().unwrap_or("");
            [&k.said.text, short].iter().any(|name| !name.is_empty() && path == format!("/dev/md/{name}"))
        });
        group.or(array).map(device)
    }

    fn named(&self, value: &str, sorts: &[Sort]) -> Option<&Known> {
        let value = value.trim_matches(['"', '\'']);
        let forms = [value.to_owned(), hexadecimal(value)];
        let same = |k: &&Known| forms.iter().any(|v| v.trim().eq_ignore_ascii_case(k.said.text.trim()));
        self.known.iter().filter(|k| sorts.contains(&k.said.sort)).find(same)
    }
}

impl Known {
    /// True for an identifier that is long enough to mean something as a word of its own.
    fn stands_alone(&self) -> bool {
        let digits = self.bare.bytes().all(|b| b.is_ascii_digit());
        self.bare.chars().count() >= if digits || self.said.sort == Sort::Id { 8 } else { 4 }
    }

    fn mention(&self) -> Mention {
        Mention { device: self.device.clone(), word: self.said.text.clone() }
    }
}

impl Sort {
    /// True for identifiers that are looked for in any place of a line.
    fn is_unique(self) -> bool {
        matches!(self, Self::Uuid | Self::PartUuid | Self::PoolNumber | Self::Id)
    }
}

/// Lower case, letters and digits alone: `:` and `-` stand in other places in other tables.
fn bare(text: &str) -> String {
    text.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

/// A PCI address in full, `0000:02:00.0`, or `0000:02:00` where all functions are meant; one with neither domain nor
/// function only if `short`.
fn pci_address(word: &str, short: bool) -> Option<String> {
    let (place, function) = word.split_once('.').map_or((word, None), |(place, function)| (place, Some(function)));
    let parts: Vec<&str> = place.split(':').collect();
    let (domain, bus, slot) = match parts[..] {
        [domain, bus, slot] if matches!(domain.len(), 4..=8) => (domain, bus, slot),
        [bus, slot] if short || function.is_some() => ("0", bus, slot),
        _ => return None,
    };
    let number = |text: &str| u32::from_str_radix(text, 16).ok();
    if bus.len() != 2 || slot.len() != 2 || function.is_some_and(|f| f.len() != 1) {
        return None;
    }
    let function = function.map_or(Some(String::new()), |f| number(f).map(|f| format!(".{f:x}")))?;
    Some(format!("{:04x}:{:02x}:{:02x}{function}", number(domain)?, number(bus)?, number(slot)?))
}

/// True if `word` stands in `line` with no letter or digit on either side.
fn alone(line: &str, word: &str) -> bool {
    let edge = |c: Option<char>| !c.is_some_and(char::is_alphanumeric);
    line.match_indices(word)
        .any(|(at, _)| edge(line[..at].chars().next_back()) && edge(line[at + word.len()..].chars().next()))
}

/// A name as udev writes it into links: anything unusual is an underscore.
fn underscored(name: &str) -> String {
    let mut out = String::new();
    for c in hexadecimal(name).chars().map(|c| if c.is_alphanumeric() || c == '.' { c } else { '_' }) {
        // Runs of blanks become one.
        if c != '_' || !out.ends_with('_') {
            out.push(c);
        }
    }
    out
}

/// True if `id` is a part of `name` between separators.
fn contains(name: &str, id: &str) -> bool {
    let (name, id) = (name.to_lowercase(), id.to_lowercase());
    !id.is_empty() && alone(&name.replace('_', " "), &id.replace('_', " "))
}

/// Numbers that a pair may mean: decimal (259:11) or hexadecimal (103:0b).
fn pairs(part: &str) -> Vec<Number> {
    let pair = |radix| {
        let (major, minor) = part.split_once(':')?;
        let number = |text: &str| u32::from_str_radix(text, radix).ok();
        Some(Number { major: number(major)?, minor: number(minor)? })
    };
    pair(10).into_iter().chain(pair(16)).collect()
}

/// `new_decode_dev` of the kernel.
fn hex_number(text: &str) -> Option<Number> {
    let n = u32::from_str_radix(text.trim_start_matches("0x"), 16).ok()?;
    Some(Number { major: (n & 0xf_ff00) >> 8, minor: n & 0xff | (n >> 12 & 0xf_ff00) })
}

/// A text with the escapes of all programs undone, itself first. Twice, since one table may hold the
/// escapes of another (`\134x20`).
fn decoded(text: &str) -> Vec<String> {
    let mut all = vec![text.to_owned()];
    if !text.contains(['\\', '%', '&']) {
        return all;
    }
    for _ in 0..2 {
        for text in all.clone() {
            for decode in [octal, hexadecimal, percent, entities, json] {
                let text = decode(&text);
                if !all.contains(&text) && all.len() < 16 {
                    all.push(text);
                }
            }
        }
    }
    all
}

/// The parts of a line that may be a name: words with their quotes heeded, what follows each `=`, and
/// the members of lists.
fn parts(line: &str) -> Vec<String> {
    // Blanks of Unicode do not end a word in any table.
    let mut words: Vec<String> = line.split_ascii_whitespace().map(str::to_owned).collect();
    words.extend(quoted(line));
    words.push(line.trim().to_owned());
    let mut out = Vec::new();
    for word in words {
        let plain: String = word.chars().filter(|c| !matches!(c, '"' | '\'')).collect();
        let lists = ['"', '\'', ',', ';', '<', '>', '(', ')', '[', ']', '{', '}', '|', '\t'];
        let mut all = vec![word.clone(), plain.clone()];
        all.extend(word.split(lists).map(str::to_owned));
        all.extend(plain.split(|c| lists.contains(&c) || c == ':').map(str::to_owned));
        for text in all {
            let mut rest = text.as_str();
            out.push(rest.to_owned());
            // `file//dev/…`, `host_device:/dev/…`.
            out.extend(rest.find("/dev/").map(|at| rest[at..].to_owned()));
            while let Some((_, value)) = rest.split_once('=') {
                // What is longer is no name; the rest of it has its turn behind the next `=`.
                let short = value.len() <= NAME_MAX;
                let lists = if short { value } else { value.split('=').next().unwrap_or_default() };
                out.extend(short.then(|| value.to_owned()));
                out.extend(lists.split([':', ',']).map(str::to_owned));
                rest = value;
            }
        }
    }
    for part in &mut out {
        if part.trim().len() != part.len() {
            *part = part.trim().to_owned();
        }
        while part.contains("//") {
            *part = part.replace("//", "/");
        }
    }
    out.retain(|p| !p.is_empty());
    out.sort_unstable();
    out.dedup();
    out
}

/// What a shell makes of a line: words that keep the white space in their quotes.
fn quoted(line: &str) -> Vec<String> {
    let (mut out, mut word, mut quote) = (Vec::new(), String::new(), None);
    for c in line.chars() {
        match (quote, c) {
            (None, '"' | '\'') => quote = Some(c),
            (Some(q), c) if q == c => quote = None,
            (None, c) if c.is_ascii_whitespace() => out.push(std::mem::take(&mut word)),
            (_, c) => word.push(c),
        }
    }
    out.push(word);
    out
}

/// Replaces each escape that begins with `mark` by the byte that `byte` makes of what follows and of
/// how many bytes that is.
fn unescape(text: &str, mark: &[u8], byte: impl Fn(&[u8]) -> Option<(u8, usize)>) -> String {
    let (bytes, mut out, mut at) = (text.as_bytes(), Vec::with_capacity(text.len()), 0);
    while at < bytes.len() {
        let found = bytes[at..].strip_prefix(mark).and_then(&byte);
        match found {
            Some((value, len)) => {
                out.push(value);
                at += mark.len() + len;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn digits(bytes: &[u8], len: usize, radix: u32) -> Option<(u8, usize)> {
    let text = std::str::from_utf8(bytes.get(..len)?).ok().filter(|t| t.bytes().all(|b| b.is_ascii_hexdigit()))?;
    Some((u8::try_from(u32::from_str_radix(text, radix).ok()?).ok()?, len))
}

/// `\040` as in `/etc/fstab` and `/proc/mounts`.
pub fn octal(text: &str) -> String {
    unescape(text, b"\\", |rest| digits(rest, 3, 8))
}

/// `\x20` as in names of udev and in units.
pub fn hexadecimal(text: &str) -> String {
    unescape(text, b"\\x", |rest| digits(rest, 2, 16))
}

/// `%20` of URLs, and `%%` of units.
fn percent(text: &str) -> String {
    unescape(text, b"%", |rest| if rest.first() == Some(&b'%') { Some((b'%', 1)) } else { digits(rest, 2, 16) })
}

/// Entities of XML.
fn entities(text: &str) -> String {
    const NAMES: [(&[u8], u8); 5] =
        [(b"amp;", b'&'), (b"lt;", b'<'), (b"gt;", b'>'), (b"quot;", b'"'), (b"apos;", b'\'')];
    unescape(text, b"&", |rest| {
        if let Some((name, value)) = NAMES.iter().find(|(name, _)| rest.starts_with(name)) {
            return Some((*value, name.len()));
        }
        let end = rest.iter().take(10).position(|b| *b == b';')?;
        let code = std::str::from_utf8(rest.get(1..end)?).ok().filter(|_| rest[0] == b'#')?;
        let (code, radix) = code.strip_prefix(['x', 'X']).map_or((code, 10), |hex| (hex, 16));
        Some((u8::try_from(u32::from_str_radix(code, radix).ok()?).ok()?, end + 1))
    })
}

/// `\/` and `\u0020` of JSON, and `\ ` of shells.
fn json(text: &str) -> String {
    unescape(text, b"\\", |rest| match rest.first()? {
        c @ (b'/' | b'"' | b'\\' | b' ') => Some((*c, 1)),
        b'u' => digits(rest.get(3..)?, 2, 16).filter(|_| rest[1..3] == *b"00").map(|(byte, _)| (byte, 5)),
        _ => None,
    })
}

/// PARTUUIDs, labels and boot partitions of a drive's tables, as identifiers.
pub fn of_tables(tables: &partitions::Tables) -> Vec<Said> {
    let said = |sort, text: &str| Said { sort, text: text.to_owned() };
    let partitions = tables.partitions.iter();
    let names = partitions.flat_map(|p| [said(Sort::PartUuid, &p.uuid), said(Sort::PartLabel, &p.label)]);
    names.chain(tables.disks.iter().map(|d| said(Sort::PartUuid, d))).filter(|s| !s.text.is_empty()).collect()
}
