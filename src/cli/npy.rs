//! NumPy's file format 1.0 for a float32 matrix.
//! Source: numpy/lib/format.py.

use std::io::{self, Write};

/// Writes the header of a C-ordered little-endian float32 array of shape `rows` × `cols`.
pub fn write_header(out: &mut impl Write, rows: usize, cols: usize) -> io::Result<()> {
    let mut dict = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {cols}), }}");
    // Magic, version, length and dictionary together fill a multiple of 64 bytes.
    let unpadded = 10 + dict.len() + 1;
    dict.push_str(&" ".repeat(unpadded.next_multiple_of(64) - unpadded));
    dict.push('\n');
    out.write_all(b"\x93NUMPY\x01\x00")?;
    out.write_all(&(dict.len() as u16).to_le_bytes())?;
    out.write_all(dict.as_bytes())
}

/// Writes values.
pub fn write_values(out: &mut impl Write, values: &[f32]) -> io::Result<()> {
    for chunk in values.chunks(4096) {
        let bytes: Vec<u8> = chunk.iter().flat_map(|v| v.to_le_bytes()).collect();
        out.write_all(&bytes)?;
    }
    Ok(())
}
