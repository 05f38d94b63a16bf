"""Write all pictures into the directory that is named first."""

import sys
from pathlib import Path

from docs.site.pictures import PICTURES

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
for name, draw in PICTURES.items():
    (folder / f"{name}.png").write_bytes(draw())
