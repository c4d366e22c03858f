//! Operands claimed as text.

use std::ffi::OsString;

use castra::core::failure::{Exit, Failure, Result};
use castra::core::name::VmName;

/// VM names as typed; whether such VMs exist is asked later, and compared without case.
pub fn names(operands: &[OsString]) -> Result<Vec<String>> {
    operands.iter().map(name).collect()
}

/// One VM name as typed.
pub fn name(operand: &OsString) -> Result<String> {
    let text = operand.to_string_lossy();
    match text.parse::<VmName>() {
        Ok(name) => Ok(name.into()),
        Err(error) => {
            Err(Failure::new(Exit::Usage, error.to_string()).advice("`castra status` lists the VMs"))
        }
    }
}
