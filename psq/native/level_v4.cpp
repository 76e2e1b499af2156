#define PSQ_LEVEL v4
#define PSQ_VECTOR_BYTES 64
#include "level.inl"
