"""Keep the documents true: tables from committed rows, and every printed command run."""
