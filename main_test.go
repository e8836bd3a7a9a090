package main

import (
	"os"
	"testing"

	"github.com/walgate/walgate/internal/pgserver"
)

func TestMain(m *testing.M) { os.Exit(pgserver.Main(m)) }
