//! Sizes as people write them: `"2 GiB"`, `"512 MB"`, `"1.5G"`.
//!
//! Here: text to bytes. Not here: the allowed sizes (`vms`). All units are powers of 1024, as QEMU,
//! ls and upstream castra read them.

/// How a text without a unit was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) bytes: u64,
    /// No unit was written; the number was taken as MiB, as QEMU's `-m` does.
    pub(super) unitless: bool,
}

/// Bytes of a size; `None` if it is none, isn't a whole number of bytes, or doesn't fit.
pub(super) fn parse_size(text: &str) -> Option<Size> {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.' && c != '_')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = unit.trim();
    let scale: u64 = match unit.to_ascii_lowercase().as_str() {
        "b" | "byte" | "bytes" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "" | "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let whole = whole.replace('_', "");
    // Eighteen digits are the most that leave the arithmetic below room in a u128.
    if !digits(&whole) || !digits(fraction) || fraction.len() > 18 || whole.len() > 20 {
        return None;
    }
    let denominator = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let part = fraction.parse::<u128>().ok()? * u128::from(scale);
    if part % denominator != 0 {
        return None;
    }
    let bytes = whole.parse::<u128>().ok()? * u128::from(scale) + part / denominator;
    Some(Size {
        bytes: u64::try_from(bytes).ok()?,
        unitless: unit.is_empty(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_valid_and_not() {
        const MIB: u64 = 1 << 20;
        for (text, bytes) in [
            ("2 GiB", 2048 * MIB),
            ("2GiB", 2048 * MIB),
            ("2 gb", 2048 * MIB),
            ("2G", 2048 * MIB),
            ("2048 MiB", 2048 * MIB),
            ("512 mib", 512 * MIB),
            ("1.5 GiB", 1536 * MIB),
            ("0.5k", 512),
            ("  64 M ", 64 * MIB),
            ("1 TiB", MIB * MIB),
            ("65536 b", 65536),
            ("1_024 KiB", MIB),
            ("16 bytes", 16),
        ] {
            let size = parse_size(text);
            assert_eq!(
                size,
                Some(Size {
                    bytes,
                    unitless: false
                }),
                "{text:?}"
            );
        }
        let plain = Size {
            bytes: 2048 * MIB,
            unitless: true,
        };
        assert_eq!(parse_size("2048"), Some(plain));
        for bad in [
            "",
            " ",
            "lots",
            "GiB",
            "2 GiX",
            "-1 GiB",
            "+1 GiB",
            "1,5 GiB",
            "2 GiB 3",
            "0.3 KiB",
            "1.",
            ".5 GiB",
            "1..2 G",
            "1e3 M",
            "0x10 M",
            "99999999999999999999 TiB",
            "２ GiB",
            "1.0000000000000000001 GiB",
            "2 G iB",
            "nan",
            "inf",
        ] {
            assert_eq!(parse_size(bad), None, "{bad:?}");
        }
    }
}
