"""`python -m cluster tokenize|cache CONFIG [a.b=c …]`: the form that `ray job submit` runs."""

import sys

from decant import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
