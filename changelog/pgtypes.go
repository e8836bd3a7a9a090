package changelog

import (
	"fmt"
	"math/big"

	"github.com/jackc/pgx/v5/pgtype"
)

// pgLSN scans a pg_lsn difference (numeric) into an LSN.
type pgLSN LSN

// ScanNumeric implements pgtype.NumericScanner.
func (l *pgLSN) ScanNumeric(n pgtype.Numeric) error {
	if !n.Valid || n.NaN || n.Int == nil {
		return fmt.Errorf("scan LSN: not a number")
	}
	v := new(big.Int).Set(n.Int)
	if n.Exp > 0 {
		v.Mul(v, new(big.Int).Exp(big.NewInt(10), big.NewInt(int64(n.Exp)), nil))
	}
	if !v.IsUint64() {
		return fmt.Errorf("scan LSN: %s is out of range", v)
	}
	*l = pgLSN(v.Uint64())
	return nil
}

// lsnNumeric makes an LSN a parameter of type numeric.
func lsnNumeric(l LSN) pgtype.Numeric {
	return pgtype.Numeric{Int: new(big.Int).SetUint64(uint64(l)), Valid: true}
}
