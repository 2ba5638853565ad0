package build

import (
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/containerd-pve/containerd-pve/integration/testbed/guest"
)

//go:embed recipes/*.sh
var recipes embed.FS

const (
	suite  = "trixie"
	flavor = "cloud-amd64"

	// ContainerdVersion is the one the tests run with.
	ContainerdVersion   = "v2.4.2"
	containerd22Version = "v2.2.9"
	craneVersion        = "v0.22.1"
	nerdctlVersion      = "v2.1.2"
	cniVersion          = "v1.9.0"
	kubernetesVersion   = "v1.36.3"
	etcdVersion         = "v3.6.8"

	guestPackages = "zfsutils-linux,lxc,lxcfs,uidmap,iproute2,iputils-ping,procps,kmod,udev,ca-certificates,runc,crun," +
		"busybox-static,iptables,nftables,e2fsprogs,strace,apparmor,fuse3,socat,curl,jq,bash,util-linux,psmisc,time,systemd-sysv,dbus,lsof,openssl," +
		"skopeo,umoci,golang-github-containers-common,squashfs-tools,squashfs-tools-ng,zstd,xz-utils"
)

// Bed is the set of stages a guest is booted from.
type Bed struct {
	Tools, Kernel, Disk *Stage
	Host                []*Stage // what the tests need on a host that has ZFS and LXC itself
	// No part of the guest, made when they are asked for: containerd's stress program and its client suite,
	// and nerdctl with CNI's plugins; and Kubernetes.
	Stress, Suite, Nerdctl *Stage
	Kubernetes             *Stage
}

// Options are what a bed may have otherwise. The zero value is the bed of `make test`.
type Options struct {
	Mirror string // another archive of Debian packages
	ZFS    string // the suite whose ZFS module is used, with the programs of the bed's own
}

// FromEnv are the options that the user has set.
func FromEnv() Options { return Options{Mirror: os.Getenv("BED_MIRROR"), ZFS: os.Getenv("BED_ZFS")} }

// NewBed describes the bed for the checkout at repo.
func NewBed(c *Cache, repo string, o Options) (*Bed, error) {
	script := func(name string) string {
		b, err := recipes.ReadFile("recipes/" + name + ".sh")
		if err != nil {
			panic(err) // embedded: only a misspelt name below can be the cause
		}
		return string(b)
	}
	agentSource, err := sources(repo, "integration/testbed/agent", "integration/testbed/cmd/vmagent")
	if err != nil {
		return nil, err
	}
	where := []string{"MIRROR=" + o.Mirror}
	debian := map[string]string{"SUITE": suite, "FLAVOUR": flavor}
	// the library is an input of the stages that use its functions
	lib := script("lib")
	with := func(more map[string]string) map[string]string {
		m := map[string]string{"LIB": lib}
		for k, v := range more {
			m[k] = v
		}
		return m
	}
	tools := &Stage{Name: "tools", Script: script("tools"), Params: with(debian), Env: where}
	kernel := &Stage{Name: "kernel", Script: script("kernel"), Params: with(nil), Deps: []*Stage{tools}}
	kernel.Go = func(ctx context.Context, out string) error { return extractKernel(ctx, c.Path(tools), out) }
	zfs := &Stage{Name: "zfs", Script: script("zfs"), Params: map[string]string{"FLAVOUR": flavor}, Deps: []*Stage{tools, kernel}}
	if o.ZFS != "" {
		zfs.Params["SUITE"], zfs.Params["ZFS_SUITE"] = suite, o.ZFS
	}
	rootfs := &Stage{Name: "rootfs", Script: script("rootfs"), Env: where,
		Params: with(map[string]string{"SUITE": suite, "PACKAGES": guestPackages})}
	images := &Stage{Name: "images", Script: script("images"), Env: where, Deps: []*Stage{rootfs}, Go: writeImages,
		Params: with(map[string]string{"SUITE": suite, "FORMAT": imageFormat})}
	ctd := &Stage{Name: "containerd", Script: script("containerd"), Params: map[string]string{"VERSION": ContainerdVersion}}
	ctd22 := &Stage{Name: "containerd22", Script: script("containerd"), Params: map[string]string{"VERSION": containerd22Version},
		Deps: []*Stage{ctd}} // only so that not two big compilations run at once
	crane := &Stage{Name: "crane", Script: script("crane"), Params: map[string]string{"VERSION": craneVersion}}
	agent := &Stage{Name: "agent", Params: map[string]string{"SOURCE": agentSource, "GO": runtime.Version()},
		Go: func(ctx context.Context, out string) error {
			cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w",
				"-o", filepath.Join(out, "vmagent"), "./integration/testbed/cmd/vmagent")
			cmd.Dir, cmd.Env = repo, append(os.Environ(), "CGO_ENABLED=0")
			if b, err := cmd.CombinedOutput(); err != nil {
				return fmt.Errorf("go build vmagent: %w\n%s", err, b)
			}
			return nil
		}}
	disk := &Stage{Name: "disk", Script: script("disk"), Params: map[string]string{},
		Deps: []*Stage{tools, kernel, zfs, rootfs, images, ctd, ctd22, crane, agent}}
	err = fs.WalkDir(guest.Files, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := guest.Files.ReadFile(p)
		disk.Params["GUEST_"+strings.NewReplacer("-", "_", ".", "_").Replace(p)] = string(b)
		return err
	})
	if err != nil {
		return nil, err
	}
	disk.Env = []string{"GUEST=" + filepath.Join(repo, "integration/testbed/guest")}
	stress := &Stage{Name: "stress", Script: script("stress"), Params: map[string]string{"VERSION": ContainerdVersion}}
	suite := &Stage{Name: "suite", Go: writeSuite, Params: map[string]string{"VERSION": ContainerdVersion, "GO": runtime.Version()}}
	nerdctl := &Stage{Name: "nerdctl", Script: script("cni"), Params: map[string]string{"VERSION": cniVersion, "NERDCTL": nerdctlVersion, "GO": runtime.Version()}, Go: writeNerdctl}
	kubernetes := &Stage{Name: "kubernetes", Go: writeKubernetes, Params: map[string]string{"VERSION": kubernetesVersion, "ETCD": etcdVersion, "GO": runtime.Version()}}
	return &Bed{Tools: tools, Kernel: kernel, Disk: disk, Host: []*Stage{ctd, ctd22, crane, rootfs, images}, Stress: stress, Suite: suite, Nerdctl: nerdctl, Kubernetes: kubernetes}, nil
}

// source is a module's directory, as Go fetched it. What is built there is built with the versions of
// its dependencies that the module is made and tested with.
func source(ctx context.Context, module, version string) (string, error) {
	b, err := goIn(ctx, "/", "mod", "download", "-json", module+"@"+version)
	if err != nil {
		return "", err
	}
	var m struct{ Dir string }
	if err := json.Unmarshal(b, &m); err != nil {
		return "", fmt.Errorf("go mod download: %w", err)
	}
	return m.Dir, nil
}

// goIn is the output of a go command in a directory.
func goIn(ctx context.Context, dir string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	b, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go %s: %w\n%s%s", strings.Join(args, " "), err, b, stderr.Bytes())
	}
	return b, nil
}

// writeSuite compiles containerd's client suite as a program.
func writeSuite(ctx context.Context, out string) error {
	dir, err := source(ctx, "github.com/containerd/containerd/v2", ContainerdVersion)
	if err != nil {
		return err
	}
	if _, err := goIn(ctx, dir, "test", "-c", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(out, "client.test"), "./integration/client"); err != nil {
		return err
	}
	return os.CopyFS(filepath.Join(out, "testdata"), os.DirFS(filepath.Join(dir, "integration/client/testdata")))
}

// writeNerdctl builds nerdctl, whose module cannot be installed by its version: it replaces another.
func writeNerdctl(ctx context.Context, out string) error {
	dir, err := source(ctx, "github.com/containerd/nerdctl/v2", nerdctlVersion)
	if err != nil {
		return err
	}
	_, err = goIn(ctx, dir, "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", filepath.Join(out, "nerdctl"), "./cmd/nerdctl")
	return err
}

// sources is the text of the packages' Go files without the tests.
func sources(repo string, dirs ...string) (string, error) {
	var all strings.Builder
	for _, d := range dirs {
		files, err := filepath.Glob(filepath.Join(repo, d, "*.go"))
		if err != nil {
			return "", err
		}
		for _, f := range files {
			if strings.HasSuffix(f, "_test.go") {
				continue
			}
			b, err := os.ReadFile(f)
			if err != nil {
				return "", err
			}
			fmt.Fprintf(&all, "%s\n%s", filepath.Base(f), b)
		}
	}
	return all.String(), nil
}

// extractKernel makes vmlinux of vmlinuz: saves a second of inflation in an emulated guest.
func extractKernel(ctx context.Context, tools, out string) error {
	image, err := os.ReadFile(filepath.Join(out, "vmlinuz"))
	if err != nil {
		return err
	}
	for _, f := range []struct{ magic, program string }{
		{"\x28\xb5\x2f\xfd", "zstd"}, {"\xfd7zXZ\x00", "xz"}, {"\x1f\x8b\x08", "gzip"},
	} {
		for at := 0; ; at++ {
			i := bytes.Index(image[at:], []byte(f.magic))
			if i < 0 {
				break
			}
			at += i
			cmd := Tool(ctx, tools, f.program, "-dc")
			cmd.Stdin = bytes.NewReader(image[at:])
			// what follows the kernel in the file is no compressed data: the program complains, the kernel is whole
			b, err := cmd.Output()
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) {
				return fmt.Errorf("%s: %w", f.program, err)
			}
			if bytes.HasPrefix(b, []byte("\x7fELF")) {
				return os.WriteFile(filepath.Join(out, "vmlinux"), b, 0o644)
			}
		}
	}
	return errors.New("no kernel found in vmlinuz")
}

// Tool is a program of the tools stage, run through its own loader and libraries: it works on an older host too.
func Tool(ctx context.Context, tools, name string, args ...string) *exec.Cmd {
	root := filepath.Join(tools, "root")
	all := append([]string{"--library-path", filepath.Join(root, "usr/lib/x86_64-linux-gnu"), filepath.Join(root, "usr/bin", name)}, args...)
	return exec.CommandContext(ctx, filepath.Join(root, "lib64/ld-linux-x86-64.so.2"), all...)
}

// HostPackages installs what the recipes need of the host, if it is missing.
func HostPackages(ctx context.Context, say func(string)) error {
	var missing []string
	for program, pkg := range map[string]string{"mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "cpio": "cpio", "xz": "xz-utils", "zstd": "zstd"} {
		if _, err := exec.LookPath(program); err == nil {
			continue
		}
		if _, err := os.Stat("/usr/sbin/" + program); err == nil {
			continue
		}
		missing = append(missing, pkg)
	}
	if len(missing) == 0 {
		return nil
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("missing on this host: %s: install them, or run as root", strings.Join(missing, " "))
	}
	say("installing with apt-get: " + strings.Join(missing, " "))
	cmd := exec.CommandContext(ctx, "sh", "-c", `apt-get update && apt-get install -y --no-install-recommends "$@"`, "sh")
	cmd.Args = append(cmd.Args, missing...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	if b, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("apt-get install %s: %w\n%s", strings.Join(missing, " "), err, b)
	}
	return nil
}
