//! What a Postgres type means for JSON: the classes of types that are mapped alike.

use serde::{Deserialize, Serialize};

/// How the text of a value becomes JSON. Domains are already their base type here.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// `t` and `f` become `true` and `false`.
    Bool,
    /// int2, int4, int8, oid: a JSON number with the digits that Postgres sent.
    Integer,
    /// float4, float8: a number; `NaN` and the infinities become strings.
    Float,
    /// json, jsonb: embedded as they are, never parsed.
    Json,
    /// `2025-06-11T01:19:22.402358`; what does not fit that form stays Postgres text.
    Timestamp,
    /// The same in UTC with microseconds and `Z`.
    Timestamptz,
    /// `{"months","days","microseconds"}`.
    Interval,
    /// Nested JSON arrays; arrays with non-default bounds stay Postgres text.
    Array { element: Box<Kind>, delimiter: char },
    /// An object with one key per attribute.
    Composite { attributes: Vec<(String, Kind)> },
    /// pgvector's `vector` and `halfvec`: an array of numbers.
    Vector,
    /// Everything else: a JSON string holding Postgres text. numeric, money, text, uuid, date,
    /// time, timetz, bytea (`\x` hexadecimal), enums, ranges, network, geometry and unknown types.
    Text,
}

impl Kind {
    /// The kind and the name (`pg_type.typname`) of a type that every Postgres has under this
    /// number, its array included. Their numbers never change, so no catalogue is needed.
    #[must_use]
    pub fn builtin(oid: u32) -> Option<(Self, &'static str)> {
        BUILTIN.iter().find_map(|builtin| {
            if builtin.oid == oid {
                Some((builtin.kind(), &builtin.array_name[1..]))
            } else if builtin.array_oid == oid {
                let element = Box::new(builtin.kind());
                Some((Self::Array { element, delimiter: builtin.delimiter() }, builtin.array_name))
            } else {
                None
            }
        })
    }

    /// The kind of a type that every Postgres has, by its name (`pg_type.typname`).
    #[must_use]
    pub fn builtin_named(name: &str) -> Option<Self> {
        let of = |builtin: &Builtin| {
            Self::builtin(if builtin.array_name == name { builtin.array_oid } else { builtin.oid })
        };
        let is_named =
            |builtin: &&Builtin| builtin.array_name == name || &builtin.array_name[1..] == name;
        BUILTIN.iter().find(is_named).and_then(of).map(|(kind, _)| kind)
    }

    /// What a type means by Postgres's catalogue: `find` gives the rows of the types that are not
    /// [`Self::builtin`]. A type that it does not know is [`Self::Text`].
    #[must_use]
    pub fn resolve<'a>(oid: u32, find: impl Fn(u32) -> Option<&'a TypeRow>) -> Self {
        resolve(oid, &find, 0)
    }
}

/// What `pg_type` and `pg_attribute` say of one type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypeRow {
    pub oid: u32,
    /// `typname`.
    pub name: String,
    /// `typtype`: `b` base, `c` composite, `d` domain, `e` enum, `r` range, `m` multirange.
    pub class: char,
    /// `typbasetype` of a domain, otherwise 0.
    pub base: u32,
    /// `typelem` where `typoutput` is `array_out`, otherwise 0: point, name and int2vector have
    /// elements too, and their text is no array's.
    pub element: u32,
    /// `typdelim`, which belongs to the element of an array and not to the array.
    pub delimiter: char,
    /// Names and `atttypid`s of a composite type's attributes that were not dropped, by `attnum`.
    pub attributes: Vec<(String, u32)>,
}

/// Postgres refuses a type that contains itself; rows read in two statements may still seem to.
const DEPTH_MAX: usize = 32;

fn resolve<'a>(oid: u32, find: &impl Fn(u32) -> Option<&'a TypeRow>, depth: usize) -> Kind {
    if let Some((kind, _)) = Kind::builtin(oid) {
        return kind;
    }
    let Some(row) = find(oid).filter(|_| depth < DEPTH_MAX) else { return Kind::Text };
    let inner = |oid| resolve(oid, find, depth + 1);
    if row.element != 0 {
        let delimiter = match BUILTIN.iter().find(|builtin| builtin.oid == row.element) {
            Some(builtin) => builtin.delimiter(),
            None => find(row.element).map_or(',', |element| element.delimiter),
        };
        return Kind::Array { element: Box::new(inner(row.element)), delimiter };
    }
    match row.class {
        'd' => inner(row.base),
        'c' => {
            let attribute = |(name, oid): &(String, u32)| (name.clone(), inner(*oid));
            Kind::Composite { attributes: row.attributes.iter().map(attribute).collect() }
        }
        // pgvector's; extensions' types have no fixed number.
        'b' if row.name == "vector" || row.name == "halfvec" => Kind::Vector,
        _ => Kind::Text,
    }
}

/// A type whose number is fixed by Postgres's sources.
struct Builtin {
    oid: u32,
    array_oid: u32,
    /// An underscore and the type's own name.
    array_name: &'static str,
}

impl Builtin {
    fn kind(&self) -> Kind {
        match self.array_name {
            "_bool" => Kind::Bool,
            "_int2" | "_int4" | "_int8" | "_oid" => Kind::Integer,
            "_float4" | "_float8" => Kind::Float,
            "_json" | "_jsonb" => Kind::Json,
            "_timestamp" => Kind::Timestamp,
            "_timestamptz" => Kind::Timestamptz,
            "_interval" => Kind::Interval,
            _ => Kind::Text,
        }
    }

    fn delimiter(&self) -> char {
        if self.array_name == "_box" { ';' } else { ',' }
    }
}

const fn builtin(oid: u32, array_oid: u32, array_name: &'static str) -> Builtin {
    Builtin { oid, array_oid, array_name }
}

/// From `src/include/catalog/pg_type.dat` of Postgres: what a column can have, the types that
/// tables use most first.
const BUILTIN: [Builtin; 69] = [
    builtin(25, 1009, "_text"),
    builtin(23, 1007, "_int4"),
    builtin(20, 1016, "_int8"),
    builtin(1184, 1185, "_timestamptz"),
    builtin(1043, 1015, "_varchar"),
    builtin(16, 1000, "_bool"),
    builtin(3802, 3807, "_jsonb"),
    builtin(2950, 2951, "_uuid"),
    builtin(1700, 1231, "_numeric"),
    builtin(1114, 1115, "_timestamp"),
    builtin(1082, 1182, "_date"),
    builtin(21, 1005, "_int2"),
    builtin(701, 1022, "_float8"),
    builtin(700, 1021, "_float4"),
    builtin(114, 199, "_json"),
    builtin(17, 1001, "_bytea"),
    builtin(1042, 1014, "_bpchar"),
    builtin(1186, 1187, "_interval"),
    builtin(1083, 1183, "_time"),
    builtin(1266, 1270, "_timetz"),
    builtin(790, 791, "_money"),
    builtin(26, 1028, "_oid"),
    builtin(869, 1041, "_inet"),
    builtin(650, 651, "_cidr"),
    builtin(829, 1040, "_macaddr"),
    builtin(774, 775, "_macaddr8"),
    builtin(3614, 3643, "_tsvector"),
    builtin(3615, 3645, "_tsquery"),
    builtin(18, 1002, "_char"),
    builtin(19, 1003, "_name"),
    builtin(142, 143, "_xml"),
    builtin(1560, 1561, "_bit"),
    builtin(1562, 1563, "_varbit"),
    builtin(600, 1017, "_point"),
    builtin(601, 1018, "_lseg"),
    builtin(602, 1019, "_path"),
    builtin(603, 1020, "_box"),
    builtin(604, 1027, "_polygon"),
    builtin(628, 629, "_line"),
    builtin(718, 719, "_circle"),
    builtin(3904, 3905, "_int4range"),
    builtin(3906, 3907, "_numrange"),
    builtin(3908, 3909, "_tsrange"),
    builtin(3910, 3911, "_tstzrange"),
    builtin(3912, 3913, "_daterange"),
    builtin(3926, 3927, "_int8range"),
    builtin(4451, 6150, "_int4multirange"),
    builtin(4532, 6151, "_nummultirange"),
    builtin(4533, 6152, "_tsmultirange"),
    builtin(4534, 6153, "_tstzmultirange"),
    builtin(4535, 6155, "_datemultirange"),
    builtin(4536, 6157, "_int8multirange"),
    builtin(22, 1006, "_int2vector"),
    builtin(30, 1013, "_oidvector"),
    builtin(24, 1008, "_regproc"),
    builtin(2202, 2207, "_regprocedure"),
    builtin(2203, 2208, "_regoper"),
    builtin(2204, 2209, "_regoperator"),
    builtin(2205, 2210, "_regclass"),
    builtin(2206, 2211, "_regtype"),
    builtin(27, 1010, "_tid"),
    builtin(28, 1011, "_xid"),
    builtin(5069, 271, "_xid8"),
    builtin(29, 1012, "_cid"),
    builtin(1033, 1034, "_aclitem"),
    builtin(1790, 2201, "_refcursor"),
    builtin(3220, 3221, "_pg_lsn"),
    builtin(4072, 4073, "_jsonpath"),
    builtin(5038, 5039, "_pg_snapshot"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_postgres::types::Type;

    #[test]
    fn builtin_numbers_and_names_are_postgres_s() {
        for builtin in &BUILTIN {
            let name = &builtin.array_name[1..];
            assert_eq!(
                Type::from_oid(builtin.oid).map(|known| known.name().to_owned()).as_deref(),
                Some(name)
            );
            let array = Type::from_oid(builtin.array_oid).unwrap();
            assert_eq!(array.name(), builtin.array_name);
            assert_eq!(Kind::builtin(builtin.oid).map(|(_, name)| name), Some(name));
            assert_eq!(
                Kind::builtin(builtin.array_oid).map(|(_, name)| name),
                Some(builtin.array_name)
            );
        }
        assert_eq!(Kind::builtin_named("int4"), Some(Kind::Integer));
        assert_eq!(Kind::builtin_named("_int4"), Some(array(Kind::Integer, ',')));
        assert_eq!(Kind::builtin_named("mood"), None);
        assert_eq!(Kind::builtin(1007).unwrap().0, array(Kind::Integer, ','));
        assert_eq!(Kind::builtin(1020).unwrap().0, array(Kind::Text, ';'));
        assert_eq!(Kind::builtin(16_384), None);
    }

    fn array(element: Kind, delimiter: char) -> Kind {
        Kind::Array { element: Box::new(element), delimiter }
    }

    fn row(oid: u32, class: char) -> TypeRow {
        let (name, attributes) = (format!("type_{oid}"), Vec::new());
        TypeRow { oid, name, class, base: 0, element: 0, delimiter: ',', attributes }
    }

    #[test]
    fn types_of_the_catalogue_are_resolved_to_their_end() {
        let rows = [
            TypeRow { base: 20, ..row(100_001, 'd') },
            TypeRow { base: 100_001, ..row(100_002, 'd') },
            TypeRow { element: 100_002, ..row(100_003, 'b') },
            row(100_004, 'e'),
            TypeRow {
                attributes: vec![("a".to_owned(), 100_003), ("b".to_owned(), 100_004)],
                ..row(100_005, 'c')
            },
            TypeRow { name: "vector".to_owned(), ..row(100_006, 'b') },
            TypeRow { element: 603, ..row(100_007, 'b') },
            TypeRow { base: 100_008, ..row(100_008, 'd') },
            TypeRow { delimiter: '|', ..row(100_009, 'b') },
            TypeRow { element: 100_009, ..row(100_010, 'b') },
        ];
        let check = |oid, expected| {
            let found = Kind::resolve(oid, |oid| rows.iter().find(|row| row.oid == oid));
            assert_eq!(found, expected, "{oid}");
        };
        check(20, Kind::Integer);
        check(100_001, Kind::Integer);
        check(100_002, Kind::Integer);
        check(100_003, array(Kind::Integer, ','));
        check(100_004, Kind::Text);
        let attributes =
            vec![("a".to_owned(), array(Kind::Integer, ',')), ("b".to_owned(), Kind::Text)];
        check(100_005, Kind::Composite { attributes });
        check(100_006, Kind::Vector);
        check(100_007, array(Kind::Text, ';'));
        check(100_008, Kind::Text);
        check(100_010, array(Kind::Text, '|'));
        check(999_999, Kind::Text);
    }
}
