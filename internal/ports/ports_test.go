package ports

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
)

// TestMain is also the other process: it holds the port that it is told until its input ends.
func TestMain(m *testing.M) {
	var port int
	if _, err := fmt.Sscan(os.Getenv("WALGATE_TEST_HOLD"), &port); err == nil {
		has := reserve(port) != nil
		for range 100 { // nobody refers to the release any more
			runtime.GC()
			if l, err := net.Listen("unix", fmt.Sprint("@walgate-port-", port)); err == nil {
				_, has = l.Close(), false
			}
		}
		fmt.Println(has)
		_, _ = bufio.NewReader(os.Stdin).ReadByte()
		return
	}
	os.Exit(m.Run())
}

func TestReserve(t *testing.T) {
	port, release, err := Reserve()
	if err != nil {
		t.Fatal(err)
	}
	if reserve(port) != nil {
		t.Error("a second caller has it too")
	}
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatalf("it isn't free: %v", err)
	}
	defer l.Close()
	release()
	again := reserve(port)
	if again == nil {
		t.Fatal("released, it can't be had")
	}
	release() // does nothing to who has it now
	if reserve(port) != nil {
		t.Error("released twice, it was taken from its next owner")
	}
	again()
}

// TestReservedElsewhere: another process has the port, until it is killed.
func TestReservedElsewhere(t *testing.T) {
	if runtime.GOOS != "linux" {
		return // reserved within a process only
	}
	port, release, err := Reserve()
	if err != nil {
		t.Fatal(err)
	}
	release()
	other := exec.Command(os.Args[0])
	other.Env = append(os.Environ(), fmt.Sprint("WALGATE_TEST_HOLD=", port))
	in, err := other.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := other.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || strings.TrimSpace(line) != "true" {
		t.Fatalf("the other process: %q, %v", line, err)
	}
	if reserve(port) != nil {
		t.Error("what another process has is given out")
	}
	_ = other.Process.Kill()
	_ = other.Wait()
	if release := reserve(port); release == nil {
		t.Error("it can't be had after that process's end")
	} else {
		release()
	}
}
