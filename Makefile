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

# A program of its own, built once for each version: its modules are not ours.
lint_version := v2.15.0
lint := $(or $(CONTAINERD_PVE_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/containerd-pve)/lint-$(lint_version)/golangci-lint

.NOTPARALLEL:
.PHONY: help build deb image test test-unit test-bed test-suite fuzz conformance stress stress-reset demo bench bench-snapshots testbed vm-run vm-shell vm-down lint clean
.SILENT: help image conformance fuzz stress stress-reset vm-run vm-shell vm-down testbed demo bench bench-snapshots

help:
	echo 'make build       the programs, in ./bin'
	echo 'make deb         the Debian package, in ./dist'
	echo "make image       the node installer's image for Kubernetes, as an OCI archive in ./dist; image=NAME:TAG names it"
	echo 'make test        all tests: lint and unit tests here, the rest in the test bed (a VM)'
	echo 'make test-unit   unit tests only'
	echo 'make test-bed    test bed only; packages=./shim chooses, TESTBED=host uses this host instead of a VM'
	echo "make conformance containerd's client suite in the test bed; RUN=TestTask chooses, zfs=go-zfs the way to ZFS, update=1 writes docs/conformance.md"
	echo 'make fuzz        every fuzz target for a while each; time=30s packages=./lxc chooses'
	echo 'make stress      restarts=1000 operations=1000 duration=10m of containerd-stress, in the test bed; seed=7 repeats a run'
	echo 'make stress-reset the guest is reset resets=3 times while it pulls an image (a part of make stress); seed=7 repeats the moments'
	echo 'make demo        pull an image and run it with our runtime, in the test bed'
	echo 'make bench       time ctr run against runc, in the test bed; n=20 runs of each'
	echo 'make bench-snapshots  time the calls of three snapshotters; counts=10,1000 n=10 unpack=60x20x4096'
	echo 'make testbed     build the test bed (cached outside this directory)'
	echo "make vm-run CMD='ctr version' FILES='a b'   run a command in the test bed, the FILES in /work"
	echo 'make vm-shell    a shell in the test bed;  make vm-down ends its VM'
	echo 'make lint        golangci-lint;  make clean removes ./bin, ./dist and ./.bed'

build: release := $(shell git describe --tags --always --dirty 2>/dev/null)
build:
	mkdir -p bin
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w -X main.release=$(release)' -o bin/ ./cmd/...

deb: build
	deploy/deb/build dist

image: build
	deploy/image/build dist $(or $(image),localhost/containerd-pve:latest)

# the suite changes /etc/hosts and takes port 443: in the VM only
test: lint test-unit test-bed $(if $(filter host,$(TESTBED)),,test-suite)

test-unit:
	CGO_ENABLED=$(if $(race),1,0) go test $(race) -v ./...

test-bed:
	$(bed) test $(packages)

# Go fuzzes one target a call. Inputs that fail are kept in the package's testdata/fuzz.
fuzz:
	go list -f '{{.Dir}} {{join .TestGoFiles " "}}' $(packages) | while read -r dir files; do \
		for target in $$(cd "$$dir" && grep -ho '^func Fuzz[A-Za-z0-9_]*' $$files /dev/null | cut -d' ' -f2); do \
			echo "== $${dir#$(CURDIR)/} $$target"; \
			(cd "$$dir" && go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(or $(time),30s) .) || exit 1; \
		done; \
	done

stress:
	mkdir -p bin
	CGO_ENABLED=0 go test -c -tags bed -o bin/integration.test ./integration
	CGO_ENABLED=0 go test -c -tags bed -o bin/snapshotter.test ./snapshotter
	program=$$($(bed) stress-program) && integration/testbed/vm-run -f bin/integration.test -f bin/snapshotter.test -f "$$program" -f integration/stress/guest \
		'bash ./guest $(or $(restarts),1000) $(or $(operations),1000) $(or $(duration),10m) $(seed)'
	$(MAKE) stress-reset

stress-reset:
	$(bed) stress-reset -n $(or $(resets),3) $(if $(seed),-seed $(seed))

# the core of containerd's client suite
test-suite:
	$(bed) conformance -core

conformance:
	$(bed) conformance $(if $(value RUN),-run "$$RUN") $(if $(update),-update) $(if $(zfs),-zfs $(zfs))
	$(if $(value RUN),,BED_ZFS=trixie-backports $(bed) test ./snapshotter/...)
	$(if $(value RUN),,RUN='^TestLongProcessOfRunc$$' $(bed) test ./integration)
	$(if $(value RUN),,RUN='^TestLong' $(bed) test ./integration/install ./integration/cri)
	$(if $(value RUN),,RUN='^TestLongNerdctl$$' $(bed) test -nerdctl ./integration)
	$(if $(value RUN),,RUN='^TestLongKubernetes$$' $(bed) test -kubernetes ./integration/kube)

testbed:
	$(bed) setup

demo:
	integration/testbed/vm-run -f integration/demo/demo ./demo

bench:
	mkdir -p bin
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w' -o bin/bench ./integration/bench
	integration/testbed/vm-run -f bin/bench -f integration/bench/guest 'bash ./guest -n $(or $(n),20) $(if $(format),--format $(format))'

bench-snapshots:
	mkdir -p bin
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w' -o bin/bench ./integration/bench
	integration/testbed/vm-run -f bin/bench './bench snapshots --dataset tank/bench --counts $(or $(counts),10,1000) -n $(or $(n),10) $(if $(unpack),--unpack $(unpack)) $(if $(format),--format $(format))'

vm-run:
	integration/testbed/vm-run

vm-shell:
	$(bed) shell

vm-down:
	$(bed) down

lint: $(lint)
	$(lint) run ./...

$(lint):
	mkdir -p $(@D)
	GOBIN=$(@D) CGO_ENABLED=0 GOFLAGS=-buildvcs=false GOWORK=off go install -trimpath -ldflags '-s -w' github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(lint_version)

clean:
	rm -rf bin dist .bed
