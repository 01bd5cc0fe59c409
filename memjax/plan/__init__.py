"""Does a job fit? Bytes per device of a decode step, predicted from shapes and, where libtpu is installed, compiled."""
