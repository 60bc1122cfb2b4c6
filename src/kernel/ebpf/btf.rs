//! The kernel's description of its types (BTF, Documentation/bpf/btf.rst), of which one enumeration is wanted: it
//! is walked once, and nothing else of its 5 MB kept.

/// `struct btf_header`: what it begins with, and its length.
const MAGIC: u16 = 0xeb9f;
const HEADER: usize = 24;
/// `BTF_KIND_…`.
const INT: u32 = 1;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const ENUM64: u32 = 19;

/// The values of an enumeration with their names; `None`: there is no such one, or the bytes are no BTF of this
/// machine's.
pub(super) fn enumeration(btf: &[u8], wanted: &str) -> Option<Vec<(u32, String)>> {
    if btf.get(..2)? != MAGIC.to_ne_bytes() {
        return None;
    }
    let header = |at| word(btf, at).map(|word| word as usize);
    let begin = header(4)?;
    let section = |at| {
        let start = begin.checked_add(header(at)?)?;
        btf.get(start..start.checked_add(header(at + 4)?)?)
    };
    if begin < HEADER {
        return None;
    }
    let (types, strings) = (section(8)?, section(16)?);
    let name = |at: u32| {
        let rest = strings.get(at as usize..)?;
        std::str::from_utf8(&rest[..rest.iter().position(|byte| *byte == 0)?]).ok()
    };
    // A type is its name, its kind with how many parts follow, and its size or another type.
    let mut at = 0;
    while let Some(info) = word(types, at + 4) {
        let (kind, parts) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
        let follows = at + 12;
        if kind == ENUM && name(word(types, at)?) == Some(wanted) {
            let value = |part: usize| {
                let at = follows + 8 * part;
                Some((word(types, at + 4)?, name(word(types, at)?)?.to_owned()))
            };
            return (0..parts).map(value).collect();
        }
        at = follows
            + match kind {
                INT | VAR | DECL_TAG => 4,
                ARRAY => 12,
                ENUM | FUNC_PROTO => 8 * parts,
                STRUCT | UNION | DATASEC | ENUM64 => 12 * parts,
                _ => 0,
            };
    }
    None
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// BTF of these types, as words, and of these names.
    fn btf(types: &[u32], names: &str) -> Vec<u8> {
        let length = 4 * types.len() as u32;
        let header = [HEADER as u32, 0, length, length, names.len() as u32];
        let words: Vec<u8> = header.iter().chain(types).flat_map(|word| word.to_ne_bytes()).collect();
        [&MAGIC.to_ne_bytes()[..], &[1, 0], &words, names.as_bytes()].concat()
    }

    fn example() -> Vec<u8> {
        let types = [
            [1, INT << 24, 4, 32].as_slice(),
            // Two members, three words each.
            &[5, STRUCT << 24 | 2, 8, 1, 1, 0, 1, 1, 32],
            &[12, ENUM << 24 | 1, 4, 20, 9],
            &[16, ENUM << 24 | 2, 4, 20, 0, 22, 7],
        ];
        btf(&types.concat(), "\0int\0struct\0one\0two\0A\0B\0")
    }

    #[test]
    fn an_enumeration_is_found_among_other_types() {
        let found = |wanted| enumeration(&example(), wanted);
        assert_eq!(found("two"), Some(vec![(0, "A".to_owned()), (7, "B".to_owned())]));
        assert_eq!(found("one"), Some(vec![(9, "A".to_owned())]));
        assert_eq!((found("int"), found("three")), (None, None));
    }

    proptest! {
        #[test]
        fn changed_and_cut_bytes_are_read_or_not(at: prop::sample::Index, byte: u8, end: prop::sample::Index) {
            let mut bytes = example();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = enumeration(&bytes, "two");
            let _ = enumeration(&bytes[..end.index(bytes.len())], "two");
        }
    }
}
