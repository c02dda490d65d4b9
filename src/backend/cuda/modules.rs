//! The compiled kernels: cubins embedded at build time where one fits the GPU, else embedded PTX,
//! else the embedded sources compiled by NVRTC, once, into a cache in the user's directory.

use std::collections::hash_map::DefaultHasher;
use std::ffi::{CStr, CString, c_char, c_void};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cudarc::driver::sys;
use cudarc::nvrtc::sys as nvrtc;

use super::driver::{Device, Stream, check, device_error};
use crate::backend::BackendError;
pub(super) use crate::backend::reference::QUANTS;
use crate::gguf::TensorType;
use crate::storage::safe;

/// Most bytes of a cubin that are read; the largest has a few MiB.
const CUBIN_MAX: u64 = 256 << 20;

mod embedded {
    #![allow(missing_docs, clippy::all, reason = "written by build.rs")]
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

/// Shared memory that a kernel of this type declares for the type's grid and a word behind it, as `blocks.cuh`.
pub(super) fn grid_bytes(ty: TensorType) -> usize {
    match ty {
        TensorType::IQ1_S | TensorType::IQ1_M => 8196,
        TensorType::IQ2_S => 4100,
        TensorType::IQ2_XS | TensorType::IQ3_S => 2052,
        TensorType::IQ2_XXS | TensorType::IQ3_XXS => 1028,
        _ => 0,
    }
}

/// Types that are not quantised.
pub(super) const PLAINS: [TensorType; 3] = [TensorType::F32, TensorType::F16, TensorType::BF16];

/// Head sizes with attention kernels.
pub(super) const HEAD_DIMS: [usize; 7] = [16, 32, 64, 80, 96, 128, 256];

/// Most numbers that a state space has for an element, by kernel.
pub(super) const SCAN_STATES: [usize; 4] = [32, 64, 128, 256];

/// Sizes of delta nets' heads with kernels, and the most inputs that a convolution sees.
pub(super) const DELTA_DIMS: [usize; 3] = [32, 64, 128];
pub(super) const TAPS_MAX: usize = 8;

/// Largest batch of each matrix-times-vectors kernel of `gemv.cu` and `bulk.cu`.
pub(super) const GEMV_BATCHES: [usize; 4] = [1, 2, 4, 8];

/// One kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Func(sys::CUfunction);

/// Matrix times vectors, by type in the order of [`QUANTS`].
pub(super) enum Vectors {
    /// Before compute capability 9.0: `gemv.cu`, by [`GEMV_BATCHES`].
    Warps(Vec<[Func; 4]>),
    /// From it on: `bulk.cu`, by [`GEMV_BATCHES`], and what quantises several vectors for it.
    Bulk { products: Vec<[Func; 4]>, quantise: Func },
}

/// All kernels, loaded.
pub(super) struct Kernels {
    device: Arc<Device>,
    modules: Vec<sys::CUmodule>,
    pdl: bool,
    /// Matrix times vectors.
    pub vectors: Vectors,
    pub plain: Vec<[Func; 2]>,
    pub half: Vec<Func>,
    pub float: Vec<Func>,
    pub gemm_large: Func,
    pub gemm_small: Func,
    /// By type in the order of [`QUANTS`]: `thin.cu` for 16 and for 64 tokens a block.
    pub thin: Vec<[Func; 2]>,
    /// For the session's heads of sizes among [`HEAD_DIMS`].
    pub attn: Vec<AttnKernels>,
    /// `[f16, f32, q8_0][decode, prefill]` for heads of any size.
    pub wide: [[Func; 2]; 3],
    pub attn_merge: Func,
    pub attn_join: Func,
    pub prep_copy: Func,
    pub prep_norm: Func,
    pub prep_swiglu: Func,
    pub rope_store: Func,
    pub rope_heads: Func,
    pub route_topk: Func,
    pub combine: Func,
    pub hand_rows: Func,
    pub hand_choices: Func,
    pub prep_norms: Func,
    pub prep_activate: Func,
    pub prep_scaled: Func,
    pub acts: Acts,
    pub experts: ExpertKernels,
}

/// Those of `attn.cu` for heads of one size.
pub(super) struct AttnKernels {
    pub head_dim: usize,
    /// `[f16, f32][decode, prefill]`.
    pub plain: [[Func; 2]; 2],
    /// The same with caps of scores, windows and sinks.
    pub by: [[Func; 2]; 2],
}

/// Kernels of single operations.
pub(super) struct Acts {
    pub add: Func,
    pub scale: Func,
    pub position: Func,
    pub gate: Func,
    pub gate_row: Func,
    pub split: Func,
    pub logits: Func,
    pub sum: Func,
    pub route_by: Func,
    pub conv: Func,
    pub short_conv: Func,
    /// Delta nets of exact rows, by [`DELTA_DIMS`].
    pub delta: [Func; 3],
    /// Those of bulk rows: what a row is on its own, then by [`DELTA_DIMS`] what follows from the row before, then the norm.
    pub delta_rows: Func,
    pub delta_columns: [Func; 3],
    pub delta_norm: Func,
    pub copy: Func,
    pub multiply: Func,
    pub part: Func,
    pub weigh: Func,
    pub conv_biased: Func,
    pub split_groups: Func,
    pub latent: Func,
    pub of_heads: Func,
    /// By [`SCAN_STATES`].
    pub scan: [Func; 4],
    pub part_norm: Func,
}

impl Acts {
    fn load(l: &Loader) -> Result<Acts, BackendError> {
        let get = |name: &str| l.get("acts", name);
        let mixer = |name: &str| l.get("mixers", name);
        let delta = |name: &str| l.get("delta", name);
        Ok(Acts {
            add: get("act_add")?,
            scale: get("act_scale")?,
            position: get("act_position")?,
            gate: get("act_gate")?,
            gate_row: get("act_gate_row")?,
            split: get("act_split")?,
            logits: get("act_logits")?,
            sum: get("act_sum")?,
            route_by: get("route_by")?,
            conv: get("conv")?,
            short_conv: get("short_conv")?,
            delta: [delta("delta_32")?, delta("delta_64")?, delta("delta_128")?],
            delta_rows: delta("delta_rows")?,
            delta_columns: [delta("delta_columns_32")?, delta("delta_columns_64")?, delta("delta_columns_128")?],
            delta_norm: delta("delta_norm")?,
            copy: get("act_copy")?,
            multiply: get("act_multiply")?,
            part: get("act_part")?,
            weigh: get("act_weigh")?,
            conv_biased: get("conv_biased")?,
            split_groups: get("split_groups")?,
            latent: mixer("latent")?,
            of_heads: mixer("of_heads")?,
            scan: [mixer("scan_32")?, mixer("scan_64")?, mixer("scan_128")?, mixer("scan_256")?],
            part_norm: mixer("part_norm")?,
        })
    }
}

/// Those of `moe.cu`, by type in the order of [`QUANTS`], then of [`PLAINS`].
pub(super) struct ExpertKernels {
    /// Gate, up and SwiGLU of exact rows.
    pub gate_up: Vec<Func>,
    /// Down of exact rows, which also adds the choices up.
    pub down: Vec<Func>,
    /// A matrix of bulk rows, in tiles of 16, of 48 and of 64.
    pub grouped: Vec<[Func; 3]>,
    pub sort: Func,
    /// The sum of exact rows' choices, of which processors have computed some.
    pub beside: Func,
    /// By type in the order of [`PLAINS`].
    pub router: Vec<Func>,
}

// SAFETY: function and module handles may be used from any thread with the context bound.
unsafe impl Send for Kernels {}

impl Kernels {
    /// Loads the kernels for `device`, those of `attn.cu` for heads of the sizes among `head_dims` that they have.
    pub fn load(device: &Arc<Device>, head_dims: impl Iterator<Item = usize>) -> Result<Kernels, BackendError> {
        device.bind()?;
        let mut loader = Loader::new(device);
        for (unit, _) in embedded::UNITS {
            loader.load_unit(unit)?;
        }
        let l = &loader;
        let per_type = |types: &[TensorType], prefix: &str| -> Result<Vec<Func>, BackendError> {
            types.iter().map(|t| l.get("dequant", &format!("{prefix}_{t}"))).collect()
        };
        let all: Vec<TensorType> = QUANTS.iter().chain(&PLAINS).copied().collect();
        // Images for 9.0 and later, PTX included, hold these; others hold those.
        let products = |unit: &str| -> Result<Vec<[Func; 4]>, BackendError> {
            let of = |t: &TensorType| -> Result<[Func; 4], BackendError> {
                let get = |n: usize| l.get(unit, &format!("{unit}_{t}_{n}"));
                Ok([get(1)?, get(2)?, get(4)?, get(8)?])
            };
            QUANTS.iter().map(of).collect()
        };
        let vectors = if device.info.capability >= (9, 0) {
            Vectors::Bulk { products: products("bulk")?, quantise: l.get("bulk", "quantise_rows")? }
        } else {
            Vectors::Warps(products("gemv")?)
        };
        let plain = PLAINS
            .iter()
            .map(|t| -> Result<[Func; 2], BackendError> {
                Ok([l.get("plain", &format!("plain_{t}_1"))?, l.get("plain", &format!("plain_{t}_8"))?])
            })
            .collect::<Result<_, _>>()?;
        let attn_of = |head_dim: usize, ending: &str| -> Result<[[Func; 2]; 2], BackendError> {
            let get = |kind: &str| l.get("attn", &format!("attn_{kind}_{head_dim}{ending}"));
            Ok([[get("decode_f16")?, get("prefill_f16")?], [get("decode_f32")?, get("prefill_f32")?]])
        };
        let mut attn: Vec<AttnKernels> = Vec::new();
        for head_dim in head_dims.filter(|dim| HEAD_DIMS.contains(dim)) {
            if attn.iter().all(|k| k.head_dim != head_dim) {
                attn.push(AttnKernels { head_dim, plain: attn_of(head_dim, "")?, by: attn_of(head_dim, "_by")? });
            }
        }
        let wide = |ty: &str| -> Result<[Func; 2], BackendError> {
            Ok([l.get("wide", &format!("wide_decode_{ty}"))?, l.get("wide", &format!("wide_prefill_{ty}"))?])
        };
        Ok(Kernels {
            device: Arc::clone(device),
            pdl: device.info.capability >= (9, 0),
            vectors,
            plain,
            half: per_type(&all, "half")?,
            float: per_type(&all, "float")?,
            gemm_large: l.get("gemm", "gemm_128x128")?,
            gemm_small: l.get("gemm", "gemm_64x64")?,
            thin: QUANTS
                .iter()
                .map(|t| Ok([l.get("thin", &format!("thin_{t}_16"))?, l.get("thin", &format!("thin_{t}_64"))?]))
                .collect::<Result<_, BackendError>>()?,
            attn,
            wide: [wide("f16")?, wide("f32")?, wide("q8")?],
            attn_merge: l.get("attn", "attn_merge")?,
            attn_join: l.get("attn", "attn_join")?,
            prep_copy: l.get("ops", "prep_copy")?,
            prep_norm: l.get("ops", "prep_norm")?,
            prep_swiglu: l.get("ops", "prep_swiglu")?,
            rope_store: l.get("ops", "rope_store")?,
            rope_heads: l.get("ops", "rope_heads")?,
            route_topk: l.get("ops", "route_topk")?,
            combine: l.get("ops", "combine")?,
            hand_rows: l.get("hand", "hand_rows")?,
            hand_choices: l.get("hand", "hand_choices")?,
            prep_norms: l.get("ops", "prep_norms")?,
            prep_activate: l.get("ops", "prep_activate")?,
            prep_scaled: l.get("ops", "prep_scaled")?,
            acts: Acts::load(l)?,
            experts: ExpertKernels {
                gate_up: all.iter().map(|t| l.get("moe", &format!("gate_up_{t}"))).collect::<Result<_, _>>()?,
                down: all.iter().map(|t| l.get("moe", &format!("down_{t}"))).collect::<Result<_, _>>()?,
                grouped: all
                    .iter()
                    .map(|t| {
                        let get = |rows: usize| l.get("moe", &format!("grouped_{t}_{rows}"));
                        Ok([get(16)?, get(48)?, get(64)?])
                    })
                    .collect::<Result<_, BackendError>>()?,
                sort: l.get("moe", "sort_rows")?,
                beside: l.get("moe", "combine_beside")?,
                router: PLAINS.iter().map(|t| l.get("moe", &format!("router_{t}"))).collect::<Result<_, _>>()?,
            },
            modules: loader.modules,
        })
    }

    /// Blocks of `threads` with `shared` dynamic bytes that fit one multiprocessor at once.
    pub fn occupancy(&self, f: Func, threads: u32, shared: u32) -> Result<u32, BackendError> {
        let mut n = 0;
        check(
            // SAFETY: f is live; n receives the number.
            unsafe { sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut n, f.0, threads as i32, shared as usize) },
            "occupancy of a kernel",
        )?;
        Ok(n.max(1) as u32)
    }

    /// Launches `f` with its one argument, a structure passed by value.
    ///
    /// # Safety
    /// `args` has the layout that the kernel declares, its addresses are valid for what the kernel
    /// does with them, and `shared` is what the kernel uses.
    pub unsafe fn launch<A: Copy>(
        &self,
        stream: &Stream,
        f: Func,
        grid: (u32, u32, u32),
        threads: u32,
        shared: u32,
        args: &A,
    ) -> Result<(), BackendError> {
        let mut params = [std::ptr::from_ref(args).cast_mut().cast::<c_void>()];
        let mut attr = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        // SAFETY: the handles are live, the configuration and parameters outlive the call (the
        // driver copies them), and the caller vouches for the rest. Every kernel waits for its
        // predecessor (`pdl_wait`) before it touches what that one writes.
        let r = unsafe {
            if self.pdl {
                let config = sys::CUlaunchConfig {
                    gridDimX: grid.0,
                    gridDimY: grid.1,
                    gridDimZ: grid.2,
                    blockDimX: threads,
                    blockDimY: 1,
                    blockDimZ: 1,
                    sharedMemBytes: shared,
                    hStream: stream.raw(),
                    attrs: &mut attr,
                    numAttrs: 1,
                };
                sys::cuLaunchKernelEx(&config, f.0, params.as_mut_ptr(), std::ptr::null_mut())
            } else {
                sys::cuLaunchKernel(
                    f.0,
                    grid.0,
                    grid.1,
                    grid.2,
                    threads,
                    1,
                    1,
                    shared,
                    stream.raw(),
                    params.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            }
        };
        check(r, "a kernel could not be launched")
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            for m in &self.modules {
                // SAFETY: loaded in `load_unit`, unloaded once; the functions go with self.
                unsafe { sys::cuModuleUnload(*m) };
            }
        }
    }
}

struct Loader<'a> {
    device: &'a Device,
    /// In the order of the embedded units.
    modules: Vec<sys::CUmodule>,
}

impl<'a> Loader<'a> {
    fn new(device: &'a Device) -> Self {
        Loader { device, modules: Vec::new() }
    }

    fn load_unit(&mut self, unit: &str) -> Result<(), BackendError> {
        let image = self.image(unit)?;
        let mut module = std::ptr::null_mut();
        check(
            // SAFETY: image is a whole cubin, or PTX with a null behind it.
            unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) },
            &format!("the kernels of {unit} could not be loaded"),
        )?;
        self.modules.push(module);
        Ok(())
    }

    /// The best image of a unit: a cubin runs on GPUs of its major version from its minor on.
    fn image(&self, unit: &str) -> Result<Vec<u8>, BackendError> {
        let (major, minor) = self.device.info.capability;
        let arch = major * 10 + minor;
        let cubin = embedded::CUBINS
            .iter()
            .filter(|(u, a, _)| *u == unit && a / 10 == major && *a <= arch)
            .max_by_key(|(_, a, _)| *a);
        if let Some((.., image)) = cubin {
            return Ok(image.to_vec());
        }
        if let Some((.., text)) = embedded::PTX.iter().find(|(u, a, _)| *u == unit && *a <= arch) {
            let mut text = text.to_vec();
            text.push(0);
            return Ok(text);
        }
        compile_cached(unit, arch)
    }

    fn get(&self, unit: &str, name: &str) -> Result<Func, BackendError> {
        let text = CString::new(name).map_err(|_| device_error("kernel name"))?;
        let module = embedded::UNITS.iter().position(|(u, _)| *u == unit);
        let module = module.and_then(|i| self.modules.get(i));
        let module = *module.ok_or_else(|| device_error(format!("kernels of {unit} are missing")))?;
        let mut f = std::ptr::null_mut();
        check(
            // SAFETY: the module is loaded; f receives the handle.
            unsafe { sys::cuModuleGetFunction(&mut f, module, text.as_ptr()) },
            &format!("kernel {name}"),
        )?;
        self.allow_shared(f)?;
        Ok(Func(f))
    }

    /// Lets a kernel use all the shared memory that a block may have.
    fn allow_shared(&self, f: sys::CUfunction) -> Result<(), BackendError> {
        use sys::CUfunction_attribute_enum as A;
        let mut fixed = 0;
        // SAFETY: f is live; fixed receives the number.
        unsafe {
            check(
                sys::cuFuncGetAttribute(&mut fixed, A::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, f),
                "shared memory of a kernel",
            )?;
            check(
                sys::cuFuncSetAttribute(
                    f,
                    A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    self.device.info.shared_bytes as i32 - fixed,
                ),
                "shared memory of a kernel",
            )
        }
    }
}

/// The unit's source with its headers put in the place of their includes.
fn whole_source(unit: &str) -> String {
    let file = |table: &[(&str, &'static str)], name: &str| {
        table.iter().find(|(n, _)| *n == name).map_or("", |(_, text)| *text)
    };
    let mut seen = Vec::new();
    fn expand(text: &str, seen: &mut Vec<String>, file: &dyn Fn(&str) -> &'static str) -> String {
        let mut out = String::new();
        for line in text.lines() {
            match line.strip_prefix("#include \"").and_then(|l| l.strip_suffix('"')) {
                Some(name) if seen.iter().any(|s| s == name) => {}
                Some(name) => {
                    seen.push(name.to_owned());
                    out.push_str(&expand(file(name), seen, file));
                }
                None if line.starts_with("#pragma once") => {}
                None => {
                    out.push_str(line);
                    out.push('\n');
                }
            }
        }
        out
    }
    expand(file(embedded::UNITS, unit), &mut seen, &|n| file(embedded::HEADERS, n))
}

fn cache_dir() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cache")))?;
    Some(base.join("nt"))
}

/// A cubin from the cache, or compiled and put there.
fn compile_cached(unit: &str, arch: u32) -> Result<Vec<u8>, BackendError> {
    // SAFETY: only tries to load the library.
    if !unsafe { nvrtc::is_culib_present() } {
        return Err(device_error(format!(
            "this build has no kernels for sm_{arch}, and NVRTC (libnvrtc) is not installed to \
             compile them; build with nvcc, or install NVRTC"
        )));
    }
    let source = whole_source(unit);
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both receive a number.
    unsafe { nvrtc::nvrtcVersion(&mut major, &mut minor) };
    let mut hash = DefaultHasher::new();
    (&source, arch, major, minor, env!("CARGO_PKG_VERSION")).hash(&mut hash);
    let path = cache_dir().map(|d| d.join(format!("{unit}-sm{arch}-{:016x}.cubin", hash.finish())));
    if let Some(image) = path.as_deref().and_then(cached) {
        return Ok(image);
    }
    tracing::info!("compiling the CUDA kernels of {unit} for sm_{arch} (once)");
    let image = compile(unit, &source, arch)?;
    if let Some(path) = path {
        store(&path, &image);
    }
    Ok(image)
}

/// A cubin of the cache, if nobody but root and this user could have written it: it runs with this user's rights.
fn cached(path: &Path) -> Option<Vec<u8>> {
    let found = safe::read(path, CUBIN_MAX).ok()?;
    let me = nix::unistd::geteuid().as_raw();
    let ours = (found.uid == 0 || found.uid == me) && !found.others_write;
    // What others can rename is theirs, too. A user's own home may be open to a group, root's may not.
    let alone = me != 0 || path.parent().is_some_and(safe::is_ours_alone);
    (ours && alone).then_some(found.bytes)
}

/// Renamed into place when it is complete, so that no other process reads half a file. A cache that
/// cannot be written costs time at the next start, nothing else.
fn store(path: &Path, image: &[u8]) {
    let (folder, name) = (path.parent().unwrap_or(Path::new(".")), path.file_name().and_then(|n| n.to_str()));
    let put = |name: &str| safe::replace(&safe::cache_folder(folder)?.at(name), image, 0o644, ".nt-");
    if let Err(e) = name.map_or(Ok(()), put) {
        tracing::warn!("compiled kernels could not be kept in {}: {e}", path.display());
    }
}

fn compile(unit: &str, source: &str, arch: u32) -> Result<Vec<u8>, BackendError> {
    let text = CString::new(source).map_err(|_| device_error("kernel source"))?;
    let name = CString::new(format!("{unit}.cu")).map_err(|_| device_error("kernel name"))?;
    let options = [
        CString::new(format!("--gpu-architecture=sm_{arch}")).map_err(|_| device_error("arch"))?,
        CString::new("--std=c++17").map_err(|_| device_error("option"))?,
    ];
    let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
    let ok = nvrtc::nvrtcResult::NVRTC_SUCCESS;
    let mut program = std::ptr::null_mut();
    // SAFETY: all texts outlive the calls; the program is destroyed at the end of the block; the
    // buffers have the sizes that NVRTC asked for.
    unsafe {
        let r = nvrtc::nvrtcCreateProgram(
            &mut program,
            text.as_ptr(),
            name.as_ptr(),
            0,
            std::ptr::null(),
            std::ptr::null(),
        );
        if r != ok {
            return Err(device_error(format!("NVRTC: {r:?}")));
        }
        let r = nvrtc::nvrtcCompileProgram(program, pointers.len() as i32, pointers.as_ptr());
        let result = if r == ok {
            let mut size = 0;
            nvrtc::nvrtcGetCUBINSize(program, &mut size);
            let mut image = vec![0u8; size];
            nvrtc::nvrtcGetCUBIN(program, image.as_mut_ptr().cast());
            Ok(image)
        } else {
            let mut size = 0;
            nvrtc::nvrtcGetProgramLogSize(program, &mut size);
            let mut log = vec![0u8; size.max(1)];
            nvrtc::nvrtcGetProgramLog(program, log.as_mut_ptr().cast());
            let log = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy();
            Err(device_error(format!("NVRTC could not compile {unit} for sm_{arch}: {r:?}\n{log}")))
        };
        nvrtc::nvrtcDestroyProgram(&mut program);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_whole() {
        for (unit, _) in embedded::UNITS {
            let text = whole_source(unit);
            assert!(!text.contains("#include"), "{unit} keeps an include");
            assert!(text.contains("extern \"C\" __global__"), "{unit} has no kernel");
        }
    }

    /// Root waited at a FIFO there, wrote through links, and loaded what any user had put there.
    #[test]
    fn a_cubin_that_others_could_have_written_is_not_loaded() {
        use std::os::unix::fs::PermissionsExt;
        let folder = safe::tests::scratch();
        let path = folder.path().join("nt/x-sm80.cubin");
        store(&path, b"cubin");
        assert_eq!(cached(&path).as_deref(), Some(&b"cubin"[..]));
        let mode = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        mode(&path, 0o666);
        assert_eq!(cached(&path), None);
        let other = folder.path().join("other");
        std::fs::write(&other, "precious").unwrap();
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        assert_eq!(cached(&path), None);
        store(&path, b"cubin");
        assert_eq!(std::fs::read(&other).unwrap(), b"precious");
        std::fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o666)).unwrap();
        assert_eq!(cached(&path), None);
        store(&path, b"cubin");
        assert_eq!(cached(&path).as_deref(), Some(&b"cubin"[..]));
        if nix::unistd::geteuid().is_root() {
            mode(folder.path(), 0o777);
            assert_eq!(cached(&path), None, "others can rename the folder");
        }
    }

    /// Needs NVRTC, no GPU: `cargo test -- --ignored nvrtc`.
    #[test]
    #[ignore = "needs NVRTC and a minute"]
    fn sources_compile_with_nvrtc() {
        // SAFETY: only tries to load the library.
        assert!(unsafe { nvrtc::is_culib_present() }, "NVRTC is not installed");
        for (unit, _) in embedded::UNITS {
            for arch in [80, 120] {
                let image = compile(unit, &whole_source(unit), arch);
                assert!(image.is_ok_and(|i| !i.is_empty()), "{unit} for sm_{arch}");
            }
        }
    }
}
