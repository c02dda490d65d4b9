//! stub
#![allow(missing_docs)]
use super::*;
pub struct CpuBackend;
impl CpuBackend {
    pub fn new(_: Dims, _: usize) -> Result<CpuBackend, BackendError> {
        Ok(CpuBackend)
    }
    pub fn supports_type(_: TensorType) -> bool {
        true
    }
}
pub fn selftest(_: &mut dyn FnMut(&str)) -> Result<(), String> {
    Ok(())
}
impl Backend for CpuBackend {
    fn name(&self) -> &'static str {
        "cpu"
    }
    fn supports(&self, _: TensorType) -> bool {
        true
    }
    fn begin(&mut self, _: usize, _: usize) -> Result<(), BackendError> {
        Ok(())
    }
    fn embed(&mut self, _: &[u8], _: TensorType) -> Result<(), BackendError> {
        Ok(())
    }
    fn qkv(
        &mut self,
        _: usize,
        _: &Norm,
        _: &Linear,
        _: &Linear,
        _: &Linear,
        _: Option<&Norm>,
        _: Option<&Norm>,
    ) -> Result<(), BackendError> {
        Ok(())
    }
    fn attend(&mut self, _: usize) -> Result<(), BackendError> {
        Ok(())
    }
    fn keep(&mut self, _: usize, _: usize) -> Result<(), BackendError> {
        Ok(())
    }
    fn attn_output(&mut self, _: &Linear) -> Result<(), BackendError> {
        Ok(())
    }
    fn ffn(&mut self, _: &Norm, _: &Linear, _: &Linear, _: &Linear) -> Result<(), BackendError> {
        Ok(())
    }
    fn route(&mut self, _: &Norm, _: &Weight, _: &RouterParams) -> Result<&[u32], BackendError> {
        Ok(&[])
    }
    fn expert(&mut self, _: &Expert) -> Result<(), BackendError> {
        Ok(())
    }
    fn combine_experts(&mut self) -> Result<(), BackendError> {
        Ok(())
    }
    fn output_norm(&mut self, _: &Norm) -> Result<(), BackendError> {
        Ok(())
    }
    fn head(&mut self, _: &Weight, _: usize) -> Result<(), BackendError> {
        Ok(())
    }
    fn logits(&mut self) -> Result<&[f32], BackendError> {
        Ok(&[0.0; 49152])
    }
    fn truncate(&mut self, _: usize) {}
    fn workspace_bytes(&self) -> u64 {
        0
    }
}
