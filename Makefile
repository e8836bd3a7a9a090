# make check is what CI runs before the tests; make test is the README's test command.
.PHONY: build check test fuzz bench

build:
	go build -o walgate .

check:
	test -z "$$(gofmt -l .)"
	go vet ./...
	go tool staticcheck ./...

test: check .ci/node_modules
	go test -race -timeout 15m ./...

# A client of tus, and PostgreSQL of the newest major.
.ci/node_modules: .ci/package-lock.json
	cd .ci && npm ci --silent --no-audit --no-fund --ignore-scripts
	touch $@

# Each fuzz target for a moment; FUZZTIME=5m for a night.
FUZZTIME ?= 10s
fuzz:
	@for p in $$(go list ./...); do for f in $$(go test -list '^Fuzz' $$p | grep ^Fuzz); do \
		echo "$$p $$f"; go test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) $$p || exit 1; done; done

bench:
	go run ./bench
