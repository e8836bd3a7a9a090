package chaos

import (
	"os"
	"testing"

	"github.com/walgate/walgate/internal/built"
	"github.com/walgate/walgate/internal/pgserver"
)

func TestMain(m *testing.M) { os.Exit(built.Remove(pgserver.Main(m))) }
