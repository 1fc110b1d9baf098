"""Results of runs as files here (`store`), and the pages that are made from them (`render`)."""
