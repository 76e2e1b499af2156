#define PSQ_LEVEL v2
#define PSQ_VECTOR_BYTES 16
#include "level.inl"
