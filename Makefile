# make help lists what there is.
# CMD and RUN go on exactly as they were written: a dollar sign needs no doubling.
override CMD := $(value CMD)
override RUN := $(value RUN)
export CMD
export RUN
export FILES
bed := integration/testbed/bed
packages ?= ./...
# The race detector needs a C compiler; without one the tests run all the same.
race := $(shell command -v gcc >/dev/null 2>&1 && echo -race)

.NOTPARALLEL:
.PHONY: help build test test-unit test-bed test-suite conformance demo bench testbed vm-run vm-shell vm-down lint clean
.SILENT: help conformance vm-run vm-shell vm-down testbed demo bench

help:
	echo 'make build       the programs, in ./bin'
	echo 'make test        all tests: unit tests here, the rest in the test bed (a VM)'
	echo 'make test-unit   unit tests only'
	echo 'make test-bed    test bed only; packages=./shim chooses, TESTBED=host uses this host instead of a VM'
	echo "make conformance containerd's client suite in the test bed; RUN=TestTask chooses, update=1 writes docs/conformance.md"
	echo 'make demo        pull an image and run it with our runtime, in the test bed'
	echo 'make bench       time ctr run against runc, in the test bed; n=20 runs of each'
	echo 'make testbed     build the test bed (cached outside this directory)'
	echo "make vm-run CMD='ctr version' FILES='a b'   run a command in the test bed, the FILES in /work"
	echo 'make vm-shell    a shell in the test bed;  make vm-down ends its VM'
	echo 'make lint        gofmt and go vet;  make clean removes ./bin and ./.bed'

build:
	mkdir -p bin
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w' -o bin/ ./cmd/...

# the suite changes /etc/hosts and takes port 443: in the VM only
test: test-unit test-bed $(if $(filter host,$(TESTBED)),,test-suite)

test-unit:
	go vet ./...
	go vet -tags bed ./...
	CGO_ENABLED=$(if $(race),1,0) go test $(race) -v ./...

test-bed:
	$(bed) test $(packages)

# the core of containerd's client suite
test-suite:
	$(bed) conformance -core

conformance:
	$(bed) conformance $(if $(value RUN),-run "$$RUN") $(if $(update),-update)

testbed:
	$(bed) setup

demo:
	integration/testbed/vm-run -f integration/demo/demo ./demo

bench:
	mkdir -p bin
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w' -o bin/bench ./integration/bench
	integration/testbed/vm-run -f bin/bench -f integration/bench/guest 'bash ./guest -n $(or $(n),20) $(if $(format),--format $(format))'

vm-run:
	integration/testbed/vm-run

vm-shell:
	$(bed) shell

vm-down:
	$(bed) down

lint:
	test -z "$$(gofmt -l cmd integration lxc shim snapshotter | tee /dev/stderr)"
	go vet ./...
	go vet -tags bed ./...

clean:
	rm -rf bin .bed
