// Prints the seccomp filter that containerd puts on a container by default (Kubernetes' RuntimeDefault), as a
// BPF program for this machine's architecture.
//
// usage: seccomp CAPABILITY...     the container's capabilities: some of them allow further calls
package main

import (
	"encoding/binary"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	bpf "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"github.com/opencontainers/runtime-spec/specs-go"
	vm "golang.org/x/net/bpf"
)

var actions = map[specs.LinuxSeccompAction]bpf.Action{
	specs.ActAllow: bpf.ActionAllow,
	specs.ActErrno: bpf.ActionErrno,
}

// A masked comparison stands in the profile once, for no bit of a mask at all.
var operations = map[specs.LinuxSeccompOperator]bpf.Operation{
	specs.OpEqualTo:     bpf.Equal,
	specs.OpLessThan:    bpf.LessThan,
	specs.OpMaskedEqual: bpf.BitsNotSet,
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "seccomp:", err)
		os.Exit(1)
	}
}

func run(capabilities []string) error {
	container := specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: capabilities}}}
	profile := seccomp.DefaultProfile(&container)
	here, err := arch.GetInfo("")
	if err != nil {
		return err
	}
	policy := bpf.Policy{DefaultAction: actions[profile.DefaultAction]}
	for _, rule := range profile.Syscalls {
		group, err := translate(rule, here)
		if err != nil {
			return err
		}
		if len(group.Names)+len(group.NamesWithCondtions) > 0 {
			policy.Syscalls = append(policy.Syscalls, group)
		}
	}
	return write(policy)
}

// The profile names the calls of all architectures.
func translate(rule specs.LinuxSyscall, here *arch.Info) (group bpf.SyscallGroup, err error) {
	group.Action = actions[rule.Action]
	if rule.ErrnoRet != nil {
		group.Action |= bpf.Action(*rule.ErrnoRet)
	}
	var conditions bpf.ArgumentConditions
	for _, arg := range rule.Args {
		operation, known := operations[arg.Op]
		if !known || arg.ValueTwo != 0 {
			return group, fmt.Errorf("%v: this program does not know the comparison %v", rule.Names, arg)
		}
		conditions = append(conditions, bpf.Condition{Argument: uint32(arg.Index), Operation: operation, Value: arg.Value})
	}
	for _, name := range rule.Names {
		if _, known := here.SyscallNames[name]; !known {
			continue
		}
		if conditions == nil {
			group.Names = append(group.Names, name)
		} else {
			group.NamesWithCondtions = append(group.NamesWithCondtions, bpf.NameWithConditions{Name: name, Conditions: conditions})
		}
	}
	return group, nil
}

func write(policy bpf.Policy) error {
	program, err := policy.Assemble()
	if err != nil {
		return err
	}
	raw, err := vm.Assemble(program)
	if err != nil {
		return err
	}
	return binary.Write(os.Stdout, binary.NativeEndian, raw)
}
