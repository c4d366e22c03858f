//! A guest's metrics in words.
//!
//! Here: the metrics of castra's own guests, and any other JSON as it comes. Not here: where they come from
//! (`core::status`), escaping them (the callers).

use serde_json::Value;

use crate::app::human;

/// `load 0.24 0.05 0.02, mem available 185 MiB, uptime 6 s`: names that end in a unit are read as such.
pub fn in_words(metrics: &Value) -> String {
    let Value::Object(fields) = metrics else {
        return metrics.to_string();
    };
    let words: Vec<String> = fields.iter().map(|(name, value)| one(name, value)).collect();
    words.join(", ")
}

fn one(name: &str, value: &Value) -> String {
    if let Some((plain, amount)) = measured(name, value) {
        return format!("{} {amount}", plain.replace('_', " "));
    }
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Array(items) if items.iter().all(Value::is_number) => {
            let items: Vec<String> = items.iter().map(Value::to_string).collect();
            items.join(" ")
        }
        other => other.to_string(),
    };
    format!("{} {text}", name.replace('_', " "))
}

/// A number whose name ends in its unit.
fn measured<'n>(name: &'n str, value: &Value) -> Option<(&'n str, String)> {
    let number = value.as_u64()?;
    let (plain, unit) = name.rsplit_once('_')?;
    let amount = match unit {
        "kib" => human::bytes(number.saturating_mul(1024)),
        "mib" => human::bytes(number.saturating_mul(1024 * 1024)),
        "bytes" => human::bytes(number),
        "ms" => human::duration(number),
        "secs" => human::whole_secs(number),
        _ => return None,
    };
    Some((plain, amount))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_have_units_and_the_rest_stays() {
        for (metrics, words) in [
            (
                json!({"load": [0.24, 0.05, 0.02], "mem_available_kib": 189_440, "uptime_secs": 65}),
                "load 0.24 0.05 0.02, mem available 185 MiB, uptime 1 min 5 s",
            ),
            (
                json!({"disk_free_bytes": 1_048_576, "lag_ms": 35}),
                "disk free 1 MiB, lag 35 ms",
            ),
            (
                json!({"jobs": 3, "name": "x", "deep": {"a": [null]}}),
                "deep {\"a\":[null]}, jobs 3, name x",
            ),
            (json!({"temp_secs": -1.5}), "temp secs -1.5"),
            (json!([1, 2]), "[1,2]"),
            (json!("busy"), "\"busy\""),
        ] {
            assert_eq!(in_words(&metrics), words);
        }
    }
}
