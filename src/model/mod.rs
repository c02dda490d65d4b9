//! Architectures: hyper-parameters, tensor names, units, and one forward pass over `Backend`.
