#![forbid(unsafe_code)]
//! castra
