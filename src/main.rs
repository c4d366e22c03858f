#![forbid(unsafe_code)]
//! The `castra` command: parse, dispatch, exit code.

fn main() {}
