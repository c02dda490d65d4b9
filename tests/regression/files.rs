//! Model files: tensors, keys, types, vocabularies, files that are no model.
