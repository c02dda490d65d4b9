//! The staging arena: one mapping that storage reads into and backends compute or copy from.
