"""Groups of `tuneloom ingest` alone; a package so that `pkg://tuneloom.conf.ingest` finds them."""
