// Package nvlist is the packed form of OpenZFS's name-value lists that the ioctls
// of /dev/zfs take and give: the native encoding (NV_ENCODE_NATIVE), in the byte
// order of this machine, as module/nvpair/nvpair.c packs and unpacks it.
//
// It owns that form and nothing else: it opens no device and knows no name of
// ZFS's. Decode takes what the kernel says for hostile all the same.
package nvlist

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
)

// List is a name-value list with unique names. The types of its values are:
//
//	Present                         DATA_TYPE_BOOLEAN: being there is all it says
//	bool                            DATA_TYPE_BOOLEAN_VALUE
//	int8 … int64, uint8 … uint64    DATA_TYPE_INT8 … DATA_TYPE_UINT64
//	string, List                    DATA_TYPE_STRING, DATA_TYPE_NVLIST
//	Byte, Time                      DATA_TYPE_BYTE, DATA_TYPE_HRTIME
//	slices of these but the last, Bytes for DATA_TYPE_BYTE_ARRAY
type List map[string]any

// Present is the value of a name that has none.
type Present struct{}

// Byte is told from uint8, which ZFS has as well.
type Byte byte

// Bytes is told from []uint8 likewise.
type Bytes []byte

// Time is a high resolution time in nanoseconds.
type Time int64

// kind is data_type_t (include/sys/nvpair.h).
type kind int32

const (
	kindBoolean kind = iota + 1
	kindByte
	kindInt16
	kindUint16
	kindInt32
	kindUint32
	kindInt64
	kindUint64
	kindString
	kindByteArray
	kindInt16Array
	kindUint16Array
	kindInt32Array
	kindUint32Array
	kindInt64Array
	kindUint64Array
	kindStringArray
	kindHrtime
	kindList
	kindListArray
	kindBooleanValue
	kindInt8
	kindUint8
	kindBooleanArray
	kindInt8Array
	kindUint8Array
)

const (
	// A stream begins with nvs_header_t, then version and flags of the list.
	streamHeader = 4
	encodeNative = 0
	listHeader   = 8
	uniqueName   = 1 // NV_UNIQUE_NAME

	// pairHeader is nvpair_t up to the name.
	pairHeader = 16
	// listStruct is nvlist_t, which an embedded list has in its pair.
	listStruct = 24
	pointer    = 8
	// end is the size of a pair that is none.
	end = 4

	// maxDepth bounds lists within lists; the kernel's own limit is 20 too.
	maxDepth = 20
)

// ErrCorrupt is a packed list that is none.
var ErrCorrupt = errors.New("not a packed nvlist")

var order = binary.NativeEndian

// littleEndian is nvs_header_t's word for the byte order.
func littleEndian() byte {
	return byte(order.Uint16([]byte{1, 0}) & 1)
}

func align(n int) int { return (n + 7) &^ 7 }

// Encode packs a list. It fails on a value of another type, a name or a string
// with a NUL, and on lists nested more than 20 deep.
func Encode(l List) ([]byte, error) {
	b := []byte{encodeNative, littleEndian(), 0, 0}
	b = order.AppendUint32(b, 0) // version
	b = order.AppendUint32(b, uniqueName)
	return appendList(b, l, 0)
}

// appendList appends the pairs, in the order of their names, and the end.
func appendList(b []byte, l List, depth int) ([]byte, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("nvlist: lists nested more than %d deep", maxDepth)
	}
	for _, name := range slices.Sorted(maps.Keys(l)) {
		var err error
		if b, err = appendPair(b, name, l[name], depth); err != nil {
			return nil, err
		}
	}
	return order.AppendUint32(b, 0), nil
}

// number is a value of fixed size, or elements of one.
func number(v any) (k kind, data []byte, elements int, ok bool) {
	scalar := func(k kind) (kind, []byte, int, bool) {
		data, _ = binary.Append(nil, order, v)
		return k, data, 1, true
	}
	array := func(k kind, n int) (kind, []byte, int, bool) {
		data, _ = binary.Append(nil, order, v)
		return k, data, n, true
	}
	switch v := v.(type) {
	case Present:
		return kindBoolean, nil, 0, true
	case bool:
		return kindBooleanValue, order.AppendUint32(nil, boolean(v)), 1, true
	case []bool:
		for _, e := range v {
			data = order.AppendUint32(data, boolean(e))
		}
		return kindBooleanArray, data, len(v), true
	case Byte:
		return scalar(kindByte)
	case int8:
		return scalar(kindInt8)
	case uint8:
		return scalar(kindUint8)
	case int16:
		return scalar(kindInt16)
	case uint16:
		return scalar(kindUint16)
	case int32:
		return scalar(kindInt32)
	case uint32:
		return scalar(kindUint32)
	case int64:
		return scalar(kindInt64)
	case uint64:
		return scalar(kindUint64)
	case Time:
		return scalar(kindHrtime)
	case Bytes:
		return kindByteArray, v, len(v), true
	case []int8:
		return array(kindInt8Array, len(v))
	case []uint8:
		return array(kindUint8Array, len(v))
	case []int16:
		return array(kindInt16Array, len(v))
	case []uint16:
		return array(kindUint16Array, len(v))
	case []int32:
		return array(kindInt32Array, len(v))
	case []uint32:
		return array(kindUint32Array, len(v))
	case []int64:
		return array(kindInt64Array, len(v))
	case []uint64:
		return array(kindUint64Array, len(v))
	}
	return 0, nil, 0, false
}

func boolean(v bool) uint32 {
	if v {
		return 1
	}
	return 0
}

func appendPair(b []byte, name string, value any, depth int) ([]byte, error) {
	if strings.Contains(name, "\x00") {
		return nil, fmt.Errorf("nvlist: the name %q holds a NUL", name)
	}
	k, data, elements, ok := number(value)
	var embedded []List
	switch v := value.(type) {
	case string:
		k, elements = kindString, 1
		if strings.Contains(v, "\x00") {
			return nil, fmt.Errorf("nvlist: the value of %s holds a NUL", name)
		}
		data = append([]byte(v), 0)
	case []string:
		// Pointers, which mean nothing here, then the strings.
		k, elements, data = kindStringArray, len(v), make([]byte, pointer*len(v))
		for _, s := range v {
			if strings.Contains(s, "\x00") {
				return nil, fmt.Errorf("nvlist: a value of %s holds a NUL", name)
			}
			data = append(append(data, s...), 0) //nolint:makezero // behind the pointers, which are zero
		}
	case List:
		k, elements, embedded, data = kindList, 1, []List{v}, appendStruct(nil)
	case []List:
		k, elements, embedded, data = kindListArray, len(v), v, make([]byte, pointer*len(v))
		for range v {
			data = appendStruct(data)
		}
	default:
		if !ok {
			return nil, fmt.Errorf("nvlist: %s has a value of type %T", name, value)
		}
	}
	at := align(pairHeader + len(name) + 1)
	size := at + align(len(data))
	if len(name) >= math.MaxInt16 || size > math.MaxInt32 {
		return nil, fmt.Errorf("nvlist: %.40s is too large", name)
	}
	start := len(b)
	b = append(b, make([]byte, size)...)
	pair := b[start:]
	order.PutUint32(pair, uint32(size))
	order.PutUint16(pair[4:], uint16(len(name)+1))
	order.PutUint32(pair[8:], uint32(elements))
	order.PutUint32(pair[12:], uint32(k))
	copy(pair[pairHeader:], name)
	copy(pair[at:], data)
	for _, e := range embedded {
		var err error
		if b, err = appendList(b, e, depth+1); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// appendStruct appends the nvlist_t of a list within a list.
func appendStruct(b []byte) []byte {
	b = order.AppendUint32(b, 0)
	b = order.AppendUint32(b, uniqueName)
	return append(b, make([]byte, listStruct-listHeader)...)
}

// Decode unpacks a list, or of it the pairs with the names alone, if some are given: the others
// are stepped over, which takes a tenth of the time. What follows its end is not looked at: the kernel's
// answer stands at the beginning of a larger buffer. Of names that are there
// twice the last counts. Errors are ErrCorrupt.
func Decode(b []byte, names ...string) (List, error) {
	if len(b) < streamHeader+listHeader {
		return nil, fmt.Errorf("%w: %d bytes", ErrCorrupt, len(b))
	}
	if b[0] != encodeNative || b[1] != littleEndian() {
		return nil, fmt.Errorf("%w: encoding %d, byte order %d", ErrCorrupt, b[0], b[1])
	}
	if v := order.Uint32(b[streamHeader:]); v != 0 {
		return nil, fmt.Errorf("%w: version %d", ErrCorrupt, v)
	}
	l, _, err := decodeList(b[streamHeader+listHeader:], 0, names)
	return l, err
}

// decodeList takes pairs up to the end, those with the names if there are any, and returns what follows it.
func decodeList(b []byte, depth int, names []string) (List, []byte, error) {
	l := List{}
	rest, err := pairs(b, depth, func(pair, rest []byte) ([]byte, error) {
		if len(names) > 0 && !slices.ContainsFunc(names, func(name string) bool { return named(pair, name) }) {
			return step(pair, rest, depth)
		}
		name, value, rest, err := decodePair(pair, rest, depth)
		if err == nil {
			l[name] = value
		}
		return rest, err
	})
	if err != nil {
		return nil, nil, err
	}
	return l, rest, nil
}

// pairs calls do with each pair up to the end and what follows the pair, of which it takes the lists that the pair
// embeds and returns the rest.
func pairs(b []byte, depth int, do func(pair, rest []byte) ([]byte, error)) ([]byte, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("%w: nested more than %d deep", ErrCorrupt, maxDepth)
	}
	for {
		if len(b) < end {
			return nil, fmt.Errorf("%w: it has no end", ErrCorrupt)
		}
		size := order.Uint32(b)
		if size == 0 {
			return b[end:], nil
		}
		if size < pairHeader || uint64(size) > uint64(len(b)) {
			return nil, fmt.Errorf("%w: a pair of %d bytes in %d", ErrCorrupt, size, len(b))
		}
		rest, err := do(b[:size], b[size:])
		if err != nil {
			return nil, err
		}
		b = rest
	}
}

// named says whether a pair has the name.
func named(pair []byte, name string) bool {
	at := pair[pairHeader:]
	return len(at) > len(name) && at[len(name)] == 0 && string(at[:len(name)]) == name
}

// step takes the lists that a pair embeds off rest.
func step(pair, rest []byte, depth int) ([]byte, error) {
	lists := uint32(0)
	switch kind(order.Uint32(pair[12:])) {
	case kindList:
		lists = 1
	case kindListArray:
		lists = order.Uint32(pair[8:])
	}
	for range lists {
		var err error
		rest, err = pairs(rest, depth+1, func(pair, rest []byte) ([]byte, error) { return step(pair, rest, depth+1) })
		if err != nil {
			return nil, err
		}
	}
	return rest, nil
}

// sizes of one element.
var sizes = map[kind]int{
	kindByte: 1, kindInt8: 1, kindUint8: 1, kindInt16: 2, kindUint16: 2, kindInt32: 4, kindUint32: 4, kindBooleanValue: 4,
	kindInt64: 8, kindUint64: 8, kindHrtime: 8,
	kindByteArray: 1, kindInt8Array: 1, kindUint8Array: 1, kindInt16Array: 2, kindUint16Array: 2, kindInt32Array: 4,
	kindUint32Array: 4, kindBooleanArray: 4, kindInt64Array: 8, kindUint64Array: 8,
	kindString: 1, kindStringArray: pointer + 1, kindList: listStruct, kindListArray: pointer + listStruct,
}

// decodePair reads one pair; the lists it embeds are in rest.
func decodePair(pair, rest []byte, depth int) (string, any, []byte, error) {
	nameSize := int(int16(order.Uint16(pair[4:])))
	elements, k := order.Uint32(pair[8:]), kind(order.Uint32(pair[12:]))
	if nameSize < 1 || pairHeader+nameSize > len(pair) || pair[pairHeader+nameSize-1] != 0 {
		return "", nil, nil, fmt.Errorf("%w: a name of %d bytes", ErrCorrupt, nameSize)
	}
	name := string(pair[pairHeader : pairHeader+nameSize-1])
	data := pair[min(align(pairHeader+nameSize), len(pair)):]
	corrupt := func() (string, any, []byte, error) {
		return "", nil, nil, fmt.Errorf("%w: %q has %d elements of type %d in %d bytes", ErrCorrupt, name, elements, k, len(data))
	}
	if strings.Contains(name, "\x00") {
		return corrupt()
	}
	if k == kindBoolean {
		return name, Present{}, rest, nil
	}
	size, known := sizes[k]
	if !known || uint64(size)*uint64(elements) > uint64(len(data)) || elements > math.MaxInt32 {
		return corrupt()
	}
	n := int(elements)
	switch k {
	case kindByte, kindInt8, kindUint8, kindInt16, kindUint16, kindInt32, kindUint32, kindInt64, kindUint64, kindHrtime,
		kindBooleanValue, kindString, kindList:
		if n != 1 {
			return corrupt()
		}
	}
	var value any
	switch k {
	case kindString:
		text, ok := cString(&data)
		if !ok {
			return corrupt()
		}
		value = text
	case kindStringArray:
		data = data[pointer*n:]
		list := make([]string, 0, n)
		for range n {
			text, ok := cString(&data)
			if !ok {
				return corrupt()
			}
			list = append(list, text)
		}
		value = list
	case kindList:
		l, after, err := decodeList(rest, depth+1, nil)
		if err != nil {
			return "", nil, nil, err
		}
		value, rest = l, after
	case kindListArray:
		list := make([]List, 0, n)
		for range n {
			l, after, err := decodeList(rest, depth+1, nil)
			if err != nil {
				return "", nil, nil, err
			}
			list, rest = append(list, l), after
		}
		value = list
	default:
		value = fixed(k, data[:size*n], n)
	}
	return name, value, rest, nil
}

// cString takes a string with its NUL off the data.
func cString(data *[]byte) (string, bool) {
	i := slices.Index(*data, 0)
	if i < 0 {
		return "", false
	}
	text := string((*data)[:i])
	*data = (*data)[i+1:]
	return text, true
}

// fixed is a value of fixed size or an array of such; data has just their size.
func fixed(k kind, data []byte, n int) any {
	switch k {
	case kindByte:
		return Byte(data[0])
	case kindInt8:
		return int8(data[0])
	case kindUint8:
		return data[0]
	case kindInt16:
		return int16(order.Uint16(data))
	case kindUint16:
		return order.Uint16(data)
	case kindInt32:
		return int32(order.Uint32(data))
	case kindUint32:
		return order.Uint32(data)
	case kindInt64:
		return int64(order.Uint64(data))
	case kindUint64:
		return order.Uint64(data)
	case kindHrtime:
		return Time(order.Uint64(data))
	case kindBooleanValue:
		return order.Uint32(data) != 0
	case kindByteArray:
		return Bytes(slices.Clone(data))
	case kindUint8Array:
		return slices.Clone(data)
	case kindBooleanArray:
		list := make([]bool, n)
		for i := range list {
			list[i] = order.Uint32(data[4*i:]) != 0
		}
		return list
	case kindInt8Array:
		return array[int8](data, n)
	case kindInt16Array:
		return array[int16](data, n)
	case kindUint16Array:
		return array[uint16](data, n)
	case kindInt32Array:
		return array[int32](data, n)
	case kindUint32Array:
		return array[uint32](data, n)
	case kindInt64Array:
		return array[int64](data, n)
	default: // kindUint64Array: decodePair knows all others
		return array[uint64](data, n)
	}
}

func array[T any](data []byte, n int) []T {
	list := make([]T, n)
	// The sizes fit, and there is no other way to fail.
	_, _ = binary.Decode(data, order, list)
	return list
}
