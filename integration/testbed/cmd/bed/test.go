package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/build/constraint"
	"go/parser"
	"go/token"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd-pve/containerd-pve/integration/testbed/agent"
	"github.com/containerd-pve/containerd-pve/integration/testbed/machine"
)

// perPackage is the time limit for one package's tests in one guest.
const perPackage = 45 * time.Minute

type testPackage struct {
	ImportPath, Dir           string
	TestGoFiles, XTestGoFiles []string

	tests  []string // top-level names in files with the build tag
	binary string
	made   string // directory of what bed.make made; empty without one
	err    error  // why there is no binary
	failed atomic.Bool
	begun  sync.Once // ready
	unmade error     // why there is no state to begin with
}

func (b *bed) test(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("test", flag.ContinueOnError)
	nerdctl := flags.Bool("nerdctl", false, "put nerdctl and CNI's plugins into the guest")
	kubernetes := flags.Bool("kubernetes", false, "put Kubernetes' programs and etcd into the guest")
	if err := flags.Parse(args); err != nil {
		return exitError(2)
	}
	patterns := flags.Args()
	if len(patterns) == 0 {
		patterns = []string{"./..."}
	}
	host := os.Getenv("TESTBED") == "host"
	if host && *nerdctl {
		return errors.New("-nerdctl is for the guest: install nerdctl on this host yourself")
	}
	if host && *kubernetes {
		return errors.New("-kubernetes is for the guest: a cluster of its own would be in this host's way")
	}
	setup := b.setup
	if host {
		setup = b.hostSetup
	}
	if err := setup(ctx); err != nil {
		return err
	}
	programs, err := b.programs(ctx)
	if err != nil {
		return err
	}
	packages, err := b.bedPackages(ctx, patterns)
	if err != nil {
		return err
	}
	if len(packages) == 0 {
		return errors.New("no bed tests in " + strings.Join(patterns, " "))
	}
	tmp, err := os.MkdirTemp("", "bed-test-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	work := &testRun{b: b, host: host, programs: programs, more: map[string]string{}, out: sequence{w: os.Stdout}, jobs: make(chan *job)}
	if *nerdctl {
		if err := b.cache.Build(ctx, b.parts.Nerdctl); err != nil {
			return err
		}
		dir := b.cache.Path(b.parts.Nerdctl)
		work.more["/usr/local/bin/nerdctl"], work.more["/opt/cni/bin"] = filepath.Join(dir, "nerdctl"), filepath.Join(dir, "cni")
	}
	if *kubernetes {
		if err := b.cache.Build(ctx, b.parts.Kubernetes); err != nil {
			return err
		}
		work.more["/opt/kubernetes"] = b.cache.Path(b.parts.Kubernetes)
	}
	workers := guests
	if host {
		workers = 1 // there is but one host
		packages = slices.DeleteFunc(packages, func(p *testPackage) bool {
			if p.init() != "" {
				fmt.Printf("?   \t%s\t[needs the guest that boots %s]\n", p.ImportPath, p.init())
			}
			return p.init() != ""
		})
	}
	for i := range workers {
		work.wg.Go(func() { work.serve(ctx, filepath.Join(tmp, fmt.Sprintf("vm%d", i))) })
	}
	for _, p := range packages { // the next one is compiled while others run
		p.compile(ctx, b.repo, tmp)
		work.add(ctx, p)
	}
	close(work.jobs)
	work.wg.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if slices.ContainsFunc(packages, func(p *testPackage) bool { return p.failed.Load() }) {
		fmt.Println("FAIL")
		return exitError(1)
	}
	return nil
}

const (
	// guests is how many guests run tests at once: most of a test in an emulated
	// guest keeps one of its processors busy and not the other.
	guests = 2
	// perGuest is how many tests of one package share a guest, about.
	perGuest = 16
)

// job is what one guest runs: a package's tests or a part of them.
type job struct {
	*testPackage
	tests    []string
	part, of int
	out      *part
}

// testRun hands jobs to guests and puts their output in order.
type testRun struct {
	b        *bed
	host     bool
	programs []string
	more     map[string]string // what else the guests get, by the path there
	out      sequence
	jobs     chan *job
	wg       sync.WaitGroup
}

// add cuts a package into jobs.
func (r *testRun) add(ctx context.Context, p *testPackage) {
	of := (len(p.tests) + perGuest - 1) / perGuest
	if r.host || p.err != nil || os.Getenv("RUN") != "" {
		of = 1
	}
	begin := time.Now()
	for i := range of {
		j := &job{testPackage: p, part: i, of: of}
		for n := i; n < len(p.tests); n += of {
			j.tests = append(j.tests, p.tests[n])
		}
		last := func() string { return "" }
		if i == of-1 {
			last = func() string { return p.summary(time.Since(begin)) }
		}
		j.out = r.out.add(last)
		select {
		case r.jobs <- j:
		case <-ctx.Done():
			return
		}
	}
}

// summary is what `go test` says of a package when it is through.
func (p *testPackage) summary(took time.Duration) string {
	switch {
	case p.err != nil:
		return fmt.Sprintf("%v\nFAIL\t%s [build failed]\n", p.err, p.ImportPath)
	case p.failed.Load():
		return fmt.Sprintf("FAIL\t%s\t%.3fs\n", p.ImportPath, took.Seconds())
	}
	return fmt.Sprintf("ok  \t%s\t%.3fs\n", p.ImportPath, took.Seconds())
}

// serve runs jobs, one after the other, in guests below dir.
func (r *testRun) serve(ctx context.Context, dir string) {
	for j := range r.jobs {
		ok, err := false, j.err
		switch {
		case err != nil:
			err = nil // the summary says it
		case r.host:
			ok, err = r.b.testOnHost(ctx, j, r.programs)
		default:
			ok, err = r.testInGuest(ctx, j, dir)
		}
		if err != nil {
			fmt.Fprintln(j.out, "bed:", err)
		}
		if !ok {
			j.failed.Store(true)
		}
		if err := j.out.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "bed:", err)
		}
	}
}

// bedPackages are the packages that have test files with the build tag bed.
func (b *bed) bedPackages(ctx context.Context, patterns []string) ([]*testPackage, error) {
	cmd := exec.CommandContext(ctx, "go", append([]string{"list", "-e", "-tags", "bed", "-json=ImportPath,Dir,TestGoFiles,XTestGoFiles"}, patterns...)...)
	cmd.Dir = b.repo
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w\n%s", err, stderr.String())
	}
	var all []*testPackage
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		p := &testPackage{}
		if err := d.Decode(p); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return nil, fmt.Errorf("go list: %w", err)
		}
		for _, f := range append(p.TestGoFiles, p.XTestGoFiles...) {
			names, err := bedTests(filepath.Join(p.Dir, f))
			if err != nil {
				return nil, err
			}
			p.tests = append(p.tests, names...)
		}
		found := len(p.tests) > 0
		// What is called long runs when RUN asks for it.
		p.tests = slices.DeleteFunc(p.tests, func(name string) bool { return strings.HasPrefix(name, "TestLong") })
		slices.Sort(p.tests)
		if len(p.tests) > 0 || found && os.Getenv("RUN") != "" {
			all = append(all, p)
		}
	}
}

// init is what the package's guest has to boot: a file bed.init in its directory says it.
func (p *testPackage) init() string {
	b, err := os.ReadFile(filepath.Join(p.Dir, "bed.init"))
	if err != nil {
		return "" // busybox, the faster one
	}
	return strings.TrimSpace(string(b))
}

// bedTests are the tests, examples and fuzz targets of a file that only the tag bed brings in.
func bedTests(file string) ([]string, error) {
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	if !tagged(f) {
		return nil, nil
	}
	var names []string
	for _, d := range f.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok || fn.Recv != nil || fn.Name.Name == "TestMain" {
			continue
		}
		for _, prefix := range []string{"Test", "Example", "Fuzz"} {
			if strings.HasPrefix(fn.Name.Name, prefix) {
				names = append(names, fn.Name.Name)
			}
		}
	}
	return names, nil
}

func tagged(f *ast.File) bool {
	for _, group := range f.Comments {
		if group.Pos() > f.Package {
			return false
		}
		for _, c := range group.List {
			if !constraint.IsGoBuild(c.Text) {
				continue
			}
			x, err := constraint.Parse(c.Text)
			if err != nil {
				return false // the compiler will say it
			}
			with := func(bed bool) bool { return x.Eval(func(tag string) bool { return tag != "bed" || bed }) }
			return with(true) && !with(false)
		}
	}
	return false
}

func (p *testPackage) compile(ctx context.Context, repo, tmp string) {
	binary := filepath.Join(tmp, strings.ReplaceAll(p.ImportPath, "/", "_")+".test")
	cmd := exec.CommandContext(ctx, "go", "test", "-c", "-tags", "bed", "-o", binary, p.ImportPath)
	cmd.Dir, cmd.Env = repo, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		p.err = fmt.Errorf("go test -c %s: %w\n%s", p.ImportPath, err, bytes.TrimSpace(out))
		return
	}
	p.binary = binary
	p.make(ctx, repo, binary+".made")
}

// make calls the package's bed.make, a program that makes in the directory out what
// its tests find in ./made of their guest.
func (p *testPackage) make(ctx context.Context, repo, out string) {
	program := filepath.Join(p.Dir, "bed.make")
	if !exists(program) {
		return
	}
	if p.err = os.Mkdir(out, 0o755); p.err != nil {
		return
	}
	cmd := exec.CommandContext(ctx, program, out)
	cmd.Dir = repo
	if said, err := cmd.CombinedOutput(); err != nil {
		p.err = fmt.Errorf("%s: %w\n%s", program, err, bytes.TrimSpace(said))
	}
	p.made = out
}

// argv are the test program's arguments. RUN and BENCH in the environment choose tests and benchmarks.
func (j *job) argv(binary string, limit time.Duration) []string {
	run := "^(" + strings.Join(j.tests, "|") + ")$"
	if r := os.Getenv("RUN"); r != "" {
		run = r
	}
	a := []string{binary, "-test.v", "-test.run=" + run, "-test.timeout=" + (limit - limit/20).String()}
	if bench := os.Getenv("BENCH"); bench != "" {
		a = append(a, "-test.bench="+bench)
	}
	return a
}

func (r *testRun) testInGuest(ctx context.Context, p *job, dir string) (bool, error) {
	b := r.b
	saved, err := b.saved(ctx, p.init())
	if err != nil {
		return false, err
	}
	from := b.cache.Path(saved)
	if p.of > 1 {
		if from, err = r.ready(ctx, p.testPackage, from); err != nil {
			return false, err
		}
	}
	m, err := machine.Restore(ctx, b.cache, b.parts, from, b.accel, dir, false)
	if err != nil {
		return false, err
	}
	defer func() { _ = m.Kill() }() // its directory is emptied before the next one starts
	limited, cancel, err := limit(ctx, perPackage)
	if err != nil {
		return false, err
	}
	defer cancel()
	if p.of == 1 {
		if err := m.Client.Put(limited, r.files(p.testPackage)); err != nil {
			return false, err
		}
	}
	deadline, _ := limited.Deadline()
	code, err := m.Client.Run(limited, agent.Command{Argv: p.argv("./bed.test", time.Until(deadline)), Dir: p.work(),
		Env: guestEnv, Stdout: p.out, Stderr: p.out})
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	if err != nil {
		return false, errors.Join(fmt.Errorf("%w\nthe guest is ended; its console:\n%s", err, m.Console()), b.keep(ctx, p, m, false))
	}
	collecting, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return code == 0, b.keep(collecting, p, m, true)
}

// guestEnv is what tests find in their environment.
var guestEnv = []string{"TESTBED=1", "TESTBED_POOL=tank"}

// work is the package's directory in a guest.
func (p *testPackage) work() string { return "/work/" + p.ImportPath }

// files are what a guest for the package gets, by the path there.
func (r *testRun) files(p *testPackage) map[string]string {
	put := toGuest(r.programs)
	maps.Copy(put, r.more)
	put[p.work()+"/bed.test"] = p.binary
	if data := filepath.Join(p.Dir, "testdata"); exists(data) {
		put[p.work()+"/testdata"] = data
	}
	if p.made != "" {
		put[p.work()+"/made"] = p.made
	}
	return put
}

// ready is the directory with the guest that each part of the package begins with, made once: it has the files, and the
// package's TestMain was called with TESTBED_READY, which says that what it sets up stays.
func (r *testRun) ready(ctx context.Context, p *testPackage, from string) (string, error) {
	dir := p.binary + ".ready"
	p.begun.Do(func() {
		p.unmade = machine.Prepare(ctx, r.b.cache, r.b.parts, from, r.b.accel, dir, func(ctx context.Context, m *machine.Machine) error {
			if err := m.Client.Put(ctx, r.files(p)); err != nil {
				return err
			}
			return inGuest(ctx, m, agent.Command{Argv: []string{"./bed.test", "-test.run=^$"}, Dir: p.work(),
				Env: append(slices.Clone(guestEnv), "TESTBED_READY=1")})
		})
		if p.unmade != nil {
			p.unmade = fmt.Errorf("setting up the guest of %s: %w", p.ImportPath, p.unmade)
		}
	})
	return dir, p.unmade
}

// keep saves what helps to understand a run: console, daemons' logs, core files. A guest that hangs is not asked.
func (b *bed) keep(ctx context.Context, p *job, m *machine.Machine, ask bool) error {
	rel, err := filepath.Rel(b.repo, p.Dir)
	if err != nil {
		return err
	}
	out := filepath.Join(b.repo, ".bed", rel)
	if p.of > 1 {
		out = filepath.Join(out, fmt.Sprintf("part-%d", p.part+1))
	}
	if err := errors.Join(os.RemoveAll(out), os.MkdirAll(out, 0o755)); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(out, "console.log"), []byte(m.Console()), 0o644); err != nil {
		return err
	}
	if !ask {
		return nil
	}
	if err := m.Client.Get(ctx, out, "var/log/stack", "var/crash"); err != nil {
		return err
	}
	cores, err := filepath.Glob(filepath.Join(out, "var/crash/core.*"))
	for _, c := range cores {
		fmt.Fprintln(p.out, "bed: core file:", c)
	}
	return err
}

func exists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}
