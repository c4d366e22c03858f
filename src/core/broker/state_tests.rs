//! Tests of the state under a virtual clock.
