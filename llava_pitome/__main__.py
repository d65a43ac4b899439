"""`python -m llava_pitome`: what `llava-pitome` does."""

import sys

from llava_pitome.cli.main import main

sys.exit(main())
