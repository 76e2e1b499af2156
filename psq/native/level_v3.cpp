namespace psq_v3 {}
