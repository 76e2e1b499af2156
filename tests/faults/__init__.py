"""Real faults for real processes: hostile peers, proxies, disks, kills; and what measures them."""
