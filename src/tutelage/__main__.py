"""`python -m tutelage`, and what `accelerate launch -m tutelage` runs in each process."""

from tutelage.cli import main

main()
