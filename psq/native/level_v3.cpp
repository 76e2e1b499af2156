#define PSQ_LEVEL v3
#define PSQ_VECTOR_BYTES 32
#include "level.inl"
