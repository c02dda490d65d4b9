//! What this machine has: memory, cgroup limits, processors, drives, GPUs.
