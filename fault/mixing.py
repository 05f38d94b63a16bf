"""What spreads numbers over 64 bits, for digests that only have to differ."""

import numpy as np

MIXER = np.uint64(0x9E3779B97F4A7C15)
"""2 to the 64 over the golden ratio, odd: multiples of it lie far apart (Knuth, volume 3, section 6.4)."""
