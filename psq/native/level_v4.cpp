namespace psq_v4 {}
