namespace psq_v2 {}
