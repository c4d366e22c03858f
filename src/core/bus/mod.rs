//! The bus as its clients see it (DESIGN §6).
//!
//! Here: topics. Not here: the broker that carries messages (`core::broker`).

pub mod topic;
