"""psq's wire protocol: messages, frames, sessions, without I/O; `proto/README.md` specifies it."""
