//! A benchmark's tests as rows in llama-bench's columns, so that its users' scripts read them.

use std::path::Path;

use serde_json::{Map, Value as Json, json};

use super::super::list::count;
use super::{Measured, OutputArg, RoutingArg};
use crate::engine::{Opened, Session};
use crate::gguf::{Gguf, TensorType};
use crate::library::printable;
use crate::machine;
use crate::machine::facts::Facts;
use crate::model::UnitKind;
use crate::plan::{Cache, Home};
use crate::storage::guard::Host;

const GPU: &str = "CUDA";

/// What is the same in all rows.
pub(super) struct About {
    model_filename: String,
    model_type: String,
    model_size: u64,
    model_n_params: u64,
    cpu_info: String,
    gpu_info: String,
    backend: &'static str,
    threads: usize,
    /// Most tokens of a pass.
    batch: usize,
    kv: TensorType,
    /// Blocks in VRAM, in RAM and on storage; of those with experts, what all tokens share.
    tiers: [usize; 3],
    /// The same of experts; `None` without any.
    experts: Option<[usize; 3]>,
    /// Experts of each layer that caches in RAM hold, and slots in VRAM; `None` without such.
    cached: Option<usize>,
    in_slots: Option<usize>,
    /// `--routing`.
    routing: Option<String>,
    n_buffers: usize,
    reader: &'static str,
}

impl About {
    /// Of a session.
    pub(super) fn new(
        session: &Session,
        opened: &Opened,
        routing: Option<&RoutingArg>,
        kv: TensorType,
        threads: usize,
    ) -> About {
        let by_tier = |homes: &[Home]| [Home::A, Home::B, Home::C].map(|h| homes.iter().filter(|of| **of == h).count());
        let blocks: Vec<Home> = session.model().blocks.iter().map(|b| session.homes()[b.ffn_unit]).collect();
        let units = session.model().units.iter().zip(session.homes());
        let experts: Vec<Home> =
            units.filter(|(u, _)| matches!(u.kind, UnitKind::Expert { .. })).map(|(_, home)| *home).collect();
        let slots = |caches: &[Cache]| caches.first().map(|c| c.slots);
        let path = opened.gguf.shards.first().map_or(Path::new(""), |s| &s.path);
        About {
            model_filename: path.display().to_string(),
            model_type: model_type(&opened.gguf),
            model_size: opened.gguf.tensor_bytes(),
            model_n_params: parameters(&opened.gguf),
            cpu_info: Facts::read(&Host::default()).cpu.model.unwrap_or_default(),
            gpu_info: session.device().unwrap_or_default(),
            backend: if session.device().is_some() { GPU } else { "CPU" },
            threads,
            batch: session.max_batch(),
            kv,
            tiers: by_tier(&blocks),
            experts: Some(by_tier(&experts)).filter(|_| !experts.is_empty()),
            cached: slots(session.caches()),
            in_slots: slots(session.device_caches()),
            routing: routing.map(|r| printable(&r.to_string())),
            n_buffers: session.n_slots(),
            reader: session.reader_name().unwrap_or(""),
        }
    }

    fn tiers(&self) -> String {
        joined(self.tiers)
    }

    fn experts(&self) -> String {
        self.experts.map_or_else(String::new, joined)
    }

    /// Where experts rest, and how many of each layer caches and slots hold: `0:32:96, 24 cached`.
    fn experts_and_caches(&self) -> String {
        let of = |n: Option<usize>, what| n.map_or(String::new(), |n| format!(", {n} {what}"));
        format!("{}{}{}", self.experts(), of(self.in_slots, "in slots"), of(self.cached, "cached"))
    }
}

fn joined(tiers: [usize; 3]) -> String {
    tiers.map(|n| n.to_string()).join(":")
}

/// A column of the table.
struct Column {
    name: &'static str,
    width: usize,
    /// Text stands to the left, numbers to the right.
    is_text: bool,
    cell: String,
}

fn parameters(gguf: &Gguf) -> u64 {
    gguf.tensors.iter().map(|t| t.shape.iter().product::<u64>()).sum()
}

/// Architecture, size and quantisation in llama.cpp's words: `llama 8B Q4_K - Medium`.
fn model_type(gguf: &Gguf) -> String {
    let text = |key: &str| gguf.metadata.str(key).map(printable);
    let size = text("general.size_label").unwrap_or_else(|| count(parameters(gguf)));
    let mix = gguf.metadata.uint("general.file_type").and_then(file_type).map_or_else(|| largest(gguf), Into::into);
    format!("{} {size} {mix}", text("general.architecture").unwrap_or_else(|| "?".into()))
}

/// The type that most bytes have.
fn largest(gguf: &Gguf) -> String {
    let bytes = |ty: TensorType| gguf.tensors.iter().filter(|t| t.ty == ty).map(|t| t.bytes).sum::<u64>();
    let most = TensorType::ALL.iter().copied().max_by_key(|ty| bytes(*ty));
    most.map_or_else(String::new, |ty| ty.name().into())
}

/// `general.file_type` as llama.cpp words it. Source: llama.cpp, src/llama-model-loader.cpp, `llama_model_ftype_name`.
fn file_type(id: u64) -> Option<&'static str> {
    Some(match id {
        0 => "all F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        7 => "Q8_0",
        8 => "Q5_0",
        9 => "Q5_1",
        10 => "Q2_K - Medium",
        11 => "Q3_K - Small",
        12 => "Q3_K - Medium",
        13 => "Q3_K - Large",
        14 => "Q4_K - Small",
        15 => "Q4_K - Medium",
        16 => "Q5_K - Small",
        17 => "Q5_K - Medium",
        18 => "Q6_K",
        19 => "IQ2_XXS - 2.0625 bpw",
        20 => "IQ2_XS - 2.3125 bpw",
        21 => "Q2_K - Small",
        22 => "IQ3_XS - 3.3 bpw",
        23 => "IQ3_XXS - 3.0625 bpw",
        24 => "IQ1_S - 1.5625 bpw",
        25 => "IQ4_NL - 4.5 bpw",
        26 => "IQ3_S - 3.4375 bpw",
        27 => "IQ3_S mix - 3.66 bpw",
        28 => "IQ2_S - 2.5 bpw",
        29 => "IQ2_M - 2.7 bpw",
        30 => "IQ4_XS - 4.25 bpw",
        31 => "IQ1_M - 1.75 bpw",
        32 => "BF16",
        38 => "MXFP4 MoE",
        _ => return None,
    })
}

/// Mean and sample standard deviation; 0 for a single value.
fn mean_and_stddev(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n.max(1.0);
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (mean, if n > 1.0 { (squares / (n - 1.0)).sqrt() } else { 0.0 })
}

/// Writes rows in one format.
pub(super) struct Rows {
    format: OutputArg,
    about: About,
}

impl Rows {
    /// A writer.
    pub(super) fn new(format: OutputArg, about: About) -> Rows {
        Rows { format, about }
    }

    /// What stands before the first row.
    pub(super) fn head(&self) -> Option<String> {
        match self.format {
            OutputArg::Jsonl => None,
            OutputArg::Csv => {
                let fields = self.fields(&Measured { seconds: vec![1.0], ..Measured::default() });
                Some(fields.keys().map(String::as_str).collect::<Vec<_>>().join(","))
            }
            OutputArg::Md => {
                let columns = self.columns(&Measured::default());
                let rule = |c: &Column| match c.is_text {
                    true => "-".repeat(c.width),
                    false => format!("{}:", "-".repeat(c.width - 1)),
                };
                let (names, rules) = (line(&columns, |c| c.name.into()), line(&columns, rule));
                Some(format!("{names}\n{rules}"))
            }
        }
    }

    /// The row of a test.
    pub(super) fn row(&self, m: &Measured) -> String {
        match self.format {
            OutputArg::Md => line(&self.columns(m), |c| c.cell.clone()),
            OutputArg::Jsonl => {
                let mut fields = self.fields(m);
                let ns: Vec<u64> = m.seconds.iter().map(|s| (s * 1e9) as u64).collect();
                fields.insert("samples_ns".into(), json!(ns));
                fields.insert("samples_ts".into(), json!(m.rates()));
                Json::Object(fields).to_string()
            }
            OutputArg::Csv => {
                let value = |v: &Json| match v {
                    Json::String(s) => s.replace('"', "\"\""),
                    Json::Null => String::new(),
                    v => v.to_string(),
                };
                let fields = self.fields(m);
                fields.values().map(|v| format!("\"{}\"", value(v))).collect::<Vec<_>>().join(",")
            }
        }
    }

    /// The columns of the table and what a test has in them. `ngl` stands for a GPU, `threads` for processors, and what a model or a run
    /// has not has no column.
    fn columns(&self, m: &Measured) -> Vec<Column> {
        let a = &self.about;
        let (mean, stddev) = mean_and_stddev(&m.rates());
        let (bytes, params) = (a.model_size as f64, a.model_n_params as f64);
        let size = if bytes < (1u64 << 30) as f64 {
            format!("{:.2} MiB", bytes / 1024.0 / 1024.0)
        } else {
            format!("{:.2} GiB", bytes / 1024.0 / 1024.0 / 1024.0)
        };
        let params = if params < 1e9 { format!("{:.2} M", params / 1e6) } else { format!("{:.2} B", params / 1e9) };
        let rate = format!("{mean:.2} ± {stddev:.2}");
        let column = |name, width, is_text, cell| Column { name, width, is_text, cell };
        let text = |name, width, cell: &str| column(name, width, true, cell.into());
        let number = |name, width, cell: String| column(name, width, false, cell);
        let mut all = vec![
            text("model", 30, &a.model_type),
            number("size", 10, size),
            number("params", 10, params),
            text("backend", 10, a.backend),
        ];
        all.push(match a.backend {
            GPU => number("ngl", 3, a.tiers[0].to_string()),
            _ => number("threads", 7, a.threads.to_string()),
        });
        all.push(number("tiers", 10, a.tiers()));
        let caches = a.cached.is_some() || a.in_slots.is_some();
        if a.experts.is_some() {
            all.push(number("experts", if caches { 22 } else { 10 }, a.experts_and_caches()));
        }
        all.extend(a.routing.as_ref().map(|r| text("routing", 10, r)));
        all.push(number("test", 15, m.name()));
        if caches {
            let (vram, ram) = (m.experts.slot_hit_rate(), m.experts.cache_hit_rate());
            let told = |tier, rate: Option<f64>| rate.map(|r| format!("{tier} {:.1} %", r * 100.0));
            let hits: Vec<String> = [told("VRAM", vram), told("RAM", ram)].into_iter().flatten().collect();
            all.push(number("hits", 11, hits.join(", ")));
        }
        all.push(number("t/s", 20, rate));
        all
    }

    fn fields(&self, m: &Measured) -> Map<String, Json> {
        let a = &self.about;
        let ns: Vec<f64> = m.seconds.iter().map(|s| s * 1e9).collect();
        let ((avg_ns, stddev_ns), (avg_ts, stddev_ts)) = (mean_and_stddev(&ns), mean_and_stddev(&m.rates()));
        let fields = json!({
            "build_commit": concat!("nt-", env!("CARGO_PKG_VERSION")),
            "build_number": 0,
            "cpu_info": a.cpu_info,
            "gpu_info": a.gpu_info,
            "backends": a.backend,
            "model_filename": a.model_filename,
            "model_type": a.model_type,
            "model_size": a.model_size,
            "model_n_params": a.model_n_params,
            "n_batch": a.batch,
            "n_ubatch": a.batch,
            "n_threads": a.threads,
            "type_k": a.kv.name().to_ascii_lowercase(),
            "type_v": a.kv.name().to_ascii_lowercase(),
            "n_gpu_layers": a.tiers[0],
            "use_mmap": false,
            "n_prompt": m.test.prompt,
            "n_gen": m.test.generated,
            "n_depth": m.test.depth,
            "n_parallel": m.test.texts(),
            "test_time": machine::probe::utc(m.began_unix_s),
            "avg_ns": avg_ns as u64,
            "stddev_ns": stddev_ns as u64,
            "avg_ts": avg_ts,
            "stddev_ts": stddev_ts,
            "tiers": a.tiers(),
            "n_buffers": a.n_buffers,
            "reader": a.reader,
            "experts": a.experts(),
            "slots_per_layer": a.in_slots,
            "cached_per_layer": a.cached,
            "routing": a.routing,
            "caches": m.caches,
            "hit_rate_vram": m.experts.slot_hit_rate(),
            "hit_rate_ram": m.experts.cache_hit_rate(),
        });
        match fields {
            Json::Object(fields) => fields,
            _ => Map::new(),
        }
    }
}

/// A line of the table.
fn line(columns: &[Column], cell: impl Fn(&Column) -> String) -> String {
    let shown = |c: &Column| {
        let cell = cell(c);
        let fill = " ".repeat(c.width.saturating_sub(cell.chars().count()));
        if c.is_text { format!(" {cell}{fill} |") } else { format!(" {fill}{cell} |") }
    };
    format!("|{}", columns.iter().map(shown).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::super::{Caches, Test};
    use super::*;

    fn rows(format: OutputArg) -> Rows {
        let about = About {
            model_filename: "/m/a \"b\".gguf".into(),
            model_type: "llama 8B Q4_K - Medium".into(),
            model_size: 4_912_898_304,
            model_n_params: 8_030_261_248,
            cpu_info: "c".into(),
            gpu_info: String::new(),
            backend: "CPU",
            threads: 8,
            batch: 512,
            kv: TensorType::F16,
            tiers: [0, 20, 12],
            experts: None,
            cached: None,
            in_slots: None,
            routing: None,
            n_buffers: 3,
            reader: "io_uring",
        };
        Rows::new(format, about)
    }

    fn measured() -> Measured {
        Measured {
            test: Test { generated: 128, depth: 4096, ..Test::default() },
            seconds: vec![16.0, 32.0],
            ..Measured::default()
        }
    }

    #[test]
    fn the_table_is_llama_benchs() {
        let table = rows(OutputArg::Md);
        let row = table.row(&measured());
        let want = "| llama 8B Q4_K - Medium         |   4.58 GiB |     8.03 B | CPU        |       8 |    0:20:12 |   tg128 @ d4096 |          6.00 ± 2.83 |";
        assert_eq!(row, want);
        let head = table.head().unwrap();
        assert!(head.lines().all(|l| l.chars().count() == row.chars().count()), "{head}");
    }

    /// Guards against a table that says neither that experts rest on storage nor that their routing is forced, and in which
    /// warm caches pass for cold ones.
    #[test]
    fn rows_tell_where_experts_rest_and_who_chose_them() {
        let of = |format| {
            let mut rows = rows(format);
            rows.about.tiers = [0, 4, 0];
            rows.about.experts = Some([0, 32, 96]);
            rows.about.cached = Some(12);
            rows.about.routing = Some("zipf:1.5".into());
            rows
        };
        let mut cold = Measured { caches: Some(Caches::Cold), ..measured() };
        (cold.experts.caches.counts.hits, cold.experts.caches.counts.misses) = (1, 3);
        let table = of(OutputArg::Md);
        let (head, row) = (table.head().unwrap(), table.row(&cold));
        let cells = |line: &str| line.split('|').map(|c| c.trim().to_owned()).collect::<Vec<_>>();
        let (names, cells) = (cells(head.lines().next().unwrap()), cells(&row));
        let of_row = |name: &str| cells[names.iter().position(|n| n == name).unwrap()].as_str();
        assert_eq!((of_row("tiers"), of_row("experts")), ("0:4:0", "0:32:96, 12 cached"));
        assert_eq!((of_row("routing"), of_row("test")), ("zipf:1.5", "tg128 @ d4096 cold"));
        assert_eq!((of_row("hits"), of_row("t/s")), ("RAM 25.0 %", "6.00 ± 2.83"));
        let json: Json = serde_json::from_str(&of(OutputArg::Jsonl).row(&cold)).unwrap();
        assert_eq!((json["experts"].as_str(), json["cached_per_layer"].as_u64()), (Some("0:32:96"), Some(12)));
        assert_eq!((json["routing"].as_str(), json["caches"].as_str()), (Some("zipf:1.5"), Some("cold")));
        assert_eq!((json["hit_rate_ram"].as_f64(), json["hit_rate_vram"].is_null()), (Some(0.25), true));
        let csv = of(OutputArg::Csv).row(&cold);
        assert!(csv.ends_with("\"zipf:1.5\",\"cold\",\"\",\"0.25\""), "{csv}");
    }

    #[test]
    fn a_row_of_values_has_a_name_for_each() {
        let csv = rows(OutputArg::Csv);
        let (head, row) = (csv.head().unwrap(), csv.row(&measured()));
        let values: Vec<&str> = row[1..row.len() - 1].split("\",\"").collect();
        assert_eq!(head.split(',').count(), values.len());
        let of = |name: &str| values[head.split(',').position(|n| n == name).unwrap()];
        assert_eq!((of("n_depth"), of("avg_ts"), of("model_filename")), ("4096", "6.0", "/m/a \"\"b\"\".gguf"));
        let json: Json = serde_json::from_str(&rows(OutputArg::Jsonl).row(&measured())).unwrap();
        assert_eq!(json["samples_ns"][1], 32_000_000_000u64);
        assert_eq!(
            (json["samples_ts"][0].as_f64(), json["test_time"].as_str()),
            (Some(8.0), Some("1970-01-01T00:00:00Z"))
        );
    }
}
