# Everything a newcomer needs is `make demo` and `make test`; `make help` lists the rest.
