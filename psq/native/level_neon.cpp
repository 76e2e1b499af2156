namespace psq_neon {}
