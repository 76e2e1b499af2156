"""psq's wire protocol: messages, frames and sessions, without I/O; `proto/README.md` specifies it."""
