//! Code points of Differentiated Services (DSCP), by which networks prioritise traffic.

use std::fmt;
use std::str::FromStr;

/// Code points with names: class selectors (RFC 2474, section 4.2.2), assured forwarding (RFC 2597, section 6),
/// expedited forwarding (RFC 3246, section 2.7), voice admit (RFC 5865), lower effort (RFC 8622), and the default (RFC
/// 4594). If a code point has two names, the first is written.
const NAMES: [(&str, u8); 24] = [
    ("CS0", 0),
    ("CS1", 8),
    ("CS2", 16),
    ("CS3", 24),
    ("CS4", 32),
    ("CS5", 40),
    ("CS6", 48),
    ("CS7", 56),
    ("AF11", 10),
    ("AF12", 12),
    ("AF13", 14),
    ("AF21", 18),
    ("AF22", 20),
    ("AF23", 22),
    ("AF31", 26),
    ("AF32", 28),
    ("AF33", 30),
    ("AF41", 34),
    ("AF42", 36),
    ("AF43", 38),
    ("EF", 46),
    ("VA", 44),
    ("LE", 1),
    ("DF", 0),
];

/// A Differentiated Services code point (RFC 2474): the upper six bits of the IPv6 traffic class byte, and of the
/// former IPv4 type of service byte. The lower two bits are for congestion (ECN, RFC 3168).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dscp(u8);

impl Dscp {
    /// The value, from 0 to 63.
    pub fn bits(self) -> u8 {
        self.0
    }
}

impl fmt::Display for Dscp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.iter().find(|(_name, bits)| *bits == self.0) {
            Some((name, _bits)) => f.pad(name),
            None => fmt::Display::fmt(&self.0, f),
        }
    }
}

impl FromStr for Dscp {
    type Err = DscpError;

    fn from_str(text: &str) -> Result<Self, DscpError> {
        if let Some((_name, bits)) = NAMES.iter().find(|(name, _bits)| name.eq_ignore_ascii_case(text)) {
            return Ok(Self(*bits));
        }
        let hexadecimal = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
        let number = hexadecimal.map_or_else(|| text.parse(), |digits| u8::from_str_radix(digits, 16));
        match number {
            Ok(bits @ 0..64) => Ok(Self(bits)),
            Ok(byte) => Err(DscpError::WholeByte(byte >> 2)),
            Err(_) => Err(DscpError::Unknown),
        }
    }
}

/// Why a text is not a code point.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DscpError {
    /// Neither a number from 0 to 63 nor a name.
    #[error("not a code point; write a number from 0 to 63 or a name such as EF, AF41 or CS1")]
    Unknown,
    /// The whole byte, as other programs expect it; the code point is its upper six bits.
    #[error(
        "more than 63; it looks like a whole traffic class byte, whose code point is {0}; \
         write {0} or a name such as EF, AF41 or CS1"
    )]
    WholeByte(u8),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(text: &str) -> Result<u8, DscpError> {
        text.parse().map(Dscp::bits)
    }

    #[test]
    fn names_are_those_of_the_standards() {
        for (name, expected) in NAMES {
            assert_eq!(bits(name), Ok(expected));
            assert_eq!(bits(&name.to_lowercase()), Ok(expected));
            let written = if name == "DF" { "CS0" } else { name };
            assert_eq!(Dscp(expected).to_string(), written);
        }
        for class in 0..8 {
            assert_eq!(bits(&format!("cs{class}")), Ok(class << 3), "its bits are xxx000");
        }
        for (class, drop) in (1..5).flat_map(|class| (1..4).map(move |drop| (class, drop))) {
            assert_eq!(bits(&format!("Af{class}{drop}")), Ok(class << 3 | drop << 1), "its bits are cccdd0");
        }
        // 101110, 101100, 000001 and 000000.
        assert_eq!(["EF", "VA", "LE", "DF"].map(bits), [Ok(46), Ok(44), Ok(1), Ok(0)]);
    }

    #[test]
    fn numbers_are_decimal_or_hexadecimal() {
        for number in 0..64 {
            for text in [format!("{number}"), format!("{number:#x}"), format!("0X{number:02X}")] {
                assert_eq!(bits(&text), Ok(number), "{text}");
            }
            assert_eq!(bits(&Dscp(number).to_string()), Ok(number));
        }
        assert_eq!(Dscp(2).to_string(), "2", "it has no name");
    }

    #[test]
    fn mistakes_say_what_would_work() {
        for wrong in
            ["", " ", "-1", "256", "4.6", "0x", "0x100", "0b1", "46 ", "E F", "AF14", "AF51", "CS8", "É"]
        {
            assert_eq!(bits(wrong), Err(DscpError::Unknown), "{wrong:?}");
        }
        for (byte, code_point) in [("64", 16), ("184", 46), ("185", 46), ("0xb8", 46), ("255", 63)] {
            assert_eq!(bits(byte), Err(DscpError::WholeByte(code_point)), "{byte}");
        }
        assert_eq!(
            bits("0xB8").unwrap_err().to_string(),
            "more than 63; it looks like a whole traffic class byte, whose code point is 46; \
             write 46 or a name such as EF, AF41 or CS1"
        );
    }
}
