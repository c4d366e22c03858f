#![forbid(unsafe_code)]
//! castra
fn main() {}
