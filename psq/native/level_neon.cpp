#define PSQ_LEVEL neon
#define PSQ_VECTOR_BYTES 16
#include "level.inl"
