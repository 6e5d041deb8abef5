"""Claims: what is said of imitation learning, each as an experiment that can fail (`tutelage claims`)."""
