"""Tables: files that are not what they seem, types of columns, what is asked, the codec there and back."""
import io

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.linear_model import LogisticRegression

from rdd_nb.tables import (Schema, TableCodec, as_tables, check_table, column_of, columns_of, doubt, read_schema,
                           read_table, same_name, target_of, three_hospitals)

GOOD = 'age,sex,dose,y\n63,f,1.5,0\n41,m,2.5,1\n,f,3.5,1\n'


# Files

FILES = {  # content, what is said
    'empty': (b'', 'fewer than two names'),
    'twice': (b'a,a\n1,2\n', "column 'a' occurs twice"),
    'no rows': (b'a,b\n', 'has no rows'),
    'numbers above': (b'1,2\n3,4\n', "a column is called '1'"),
    'zero bytes': (b'a,b\n1,\x002\n', 'zero bytes'),
    'half a letter': (b'\xff\xfe\x00', 'not a table'),
    'one column': (b'a\n1\n2\n', 'fewer than two names between commas, semicolons or tabs'),
    'spaces': (b'a b\n1 2\n', 'fewer than two names'),
    'trailing comma': (GOOD.replace('\n', ',\n').replace('y,', 'y', 1).encode(),
                       r'line 2: 5 fields, the first line has 4 \(a separator at the end of the row'),
    'trailing comma everywhere': (GOOD.replace('\n', ',\n').encode(), 'no separator at its end'),
    'long row': (GOOD.encode() + b'1,2,3,4,5\n',
                 r'line 5: 5 fields, the first line has 4 \(a separator inside a value needs quotes'),
    'short row': (GOOD.encode() + b'1,2\n', r'line 5: 2 fields, the first line has 4 \(was the file cut short'),
    'comment above': (b'# made by hand\n' + GOOD.encode(), 'line 1: begins with "#"'),
    'comment below': (GOOD.encode() + b'# the end\n', r'line 5: 1 fields, .* \(a comment'),
    'open quote': (b'a,b\n"1,2\n', 'not a table|cut short'),
}


@pytest.mark.parametrize('case', FILES)
def test_files_that_are_no_tables(tmp_path, case):
    content, text = FILES[case]
    (tmp_path/'t.csv').write_bytes(content)
    with pytest.raises(ValueError, match=text) as e: read_table(tmp_path/'t.csv')
    assert str(e.value).startswith(str(
        tmp_path/'t.csv')) and '\n' not in str(e.value) and len(str(e.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize('content', [GOOD.encode(), '\ufeff'.encode() + GOOD.encode(), GOOD.encode('utf-16'),
                                     GOOD.replace(',', '\t').encode(), GOOD.replace('\n', '\r\n').encode(),
                                     GOOD.replace(',', ';').encode(), GOOD.replace(',', ';').replace('.', ',').encode(),
                                     GOOD.replace(',', ', ').encode()])
def test_files_that_are_the_same_table(tmp_path, content):
    (tmp_path/'t.csv').write_bytes(content)
    pd.testing.assert_frame_equal(read_table(tmp_path/'t.csv'), pd.read_csv(io.StringIO(GOOD)))


def test_latin1_is_read_and_said(tmp_path):
    (tmp_path/'t.csv').write_bytes('größe,y\n1,0\n2,1\n'.encode('latin-1'))
    with pytest.warns(UserWarning, match='read as Latin-1'): t = read_table(tmp_path/'t.csv')
    assert list(t) == ['größe', 'y']


def test_codes_for_missing_values(tmp_path):
    (tmp_path/'t.csv').write_bytes('\ufeffage, sex,chol\n?,f,0\n3,,200\n0,-,0.0\n'.encode())
    t = read_table(tmp_path/'t.csv', ['?', '-', 'chol=0'])
    assert t.isna().sum().to_dict() == dict(age=1, sex=2, chol=2) and t.age.dtype == float
    assert read_table(pd.DataFrame({'a': ['x', 'none'], 'b': [1, 2]}), ['a=none']).a.isna().tolist() == [False, True]


def test_leading_zeros_stay(tmp_path):
    (tmp_path/'t.csv').write_text('zip,n\n02139,0\n10115,10\n')
    assert read_table(tmp_path/'t.csv').zip.tolist() == ['02139',
                                                         '10115'] and read_table(tmp_path/'t.csv').n.tolist() == [0, 10]


def test_parquet_needs_a_package(tmp_path):
    (tmp_path/'t.parquet').write_bytes(b'PAR1')
    with pytest.raises(ValueError, match='pyarrow|not a table|[Pp]arquet') as e: read_table(tmp_path/'t.parquet')
    assert '\n' not in str(e.value)


def test_missing_files(tmp_path):
    for path in (tmp_path/'nowhere.csv', tmp_path):
        with pytest.raises(FileNotFoundError, match='there is no such file'): read_table(path)


def test_five_thousand_columns(tmp_path):
    r = np.random.default_rng(0)
    pd.DataFrame(r.normal(size=(40, 5000)).round(3),
                 columns=[f'c{i}' for i in range(5000)]).assign(y=np.arange(40) % 2).to_csv(tmp_path/'t.csv',
                     index=False)
    t = read_table(tmp_path/'t.csv')
    s = read_schema(t, 'y')
    z = TableCodec(s).fit(t).transform(t)
    assert z.shape == (40, 5000) and abs(z.std(0) - 1).max() < 1e-6


def test_names():
    for t, text in (pd.DataFrame({'a': []}), 'no rows'), (pd.DataFrame({63: [1]}),
                                                          'called 63'), (pd.DataFrame({' ': [1]}), "called ' '"), (3,
                                                              'got int'):
        with pytest.raises(ValueError, match=text): check_table(t)
    with pytest.raises(ValueError, match='expected a dict or list'): as_tables(pd.DataFrame({'a': [1]}))
    assert same_name('Age ') == same_name(
        'AGE') == same_name('_age') != same_name('age2') and same_name('+') != same_name('-')


# Types

KINDS = {
    'number': (pd.Series([1.5, 2.25, 3]), None, ('number', 2, None)), 'whole': (pd.Series([10, 20, 30]), None,
        ('number', 0, None)),
    'two numbers': (pd.Series([0, 1, 1]), None, ('category', 0, [0, 1])), 'truth': (pd.Series([True, False]), None,
        ('category', 0, [False, True])),
    'text': (pd.Series(['b', 'a', None]), None, ('category', 0, ['a', 'b'])), 'codes': (pd.Series([3, 1, 2]),
        'category', ('category', 0, [1, 2, 3])),
    'stated order': (pd.Series(['low', 'high']), ['low', 'mid', 'high'], ('ordered', 0, ['low', 'mid', 'high'])),
    'pandas order': (pd.Series(pd.Categorical(['low', 'high'], ['low', 'high'], ordered=True)), None, ('ordered', 0,
        ['low', 'high'])),
    'dates': (pd.Series(['2024-03-01', None, '2024-04-01']), None, ('date', 0, None)),
    'times': (pd.Series(pd.to_datetime(['2024-03-01 12:00', '2024-03-02 00:00'])), None, ('date', 1, None)),
    'nothing': (pd.Series([None, None]), None, ('missing', 0, None)),
    'nullable': (pd.Series([1, None, 3, 4], dtype='Int64'), None, ('number', 0, None)),
}


@pytest.mark.parametrize('case', KINDS)
def test_types(case):
    values, kind, expected = KINDS[case]
    c = column_of('x', values, kind)
    assert (c.kind, c.decimals, c.levels) == expected
    if c.kind != 'missing':
        full = values.dropna().reset_index(drop=True)
        assert c.typed(c.numbers(full)).tolist() == (pd.to_datetime(full) if c.kind == 'date' else full).tolist()
        assert np.isnan(c.numbers(values)).tolist() == values.isna().tolist()


@pytest.mark.parametrize('values, kind, text', [
    ([1, np.inf], None, 'infinite'), (['1', '2', 'n.d.'], None, "67% of the entries are numbers, but not 'n.d.'"),
    ([f'p{i}' for i in range(40)], None, 'identifier'),
    (['03/04/2024', '05/06/2024'], None, "'03/04/2024' can be read as two dates"), (['a', 'b'], ['a', 'c'],
        "'b' is none of the levels"), (['a', 'b'], 'number', "text such as 'a'")])
def test_columns_that_cannot_be(values, kind, text):
    with pytest.raises(ValueError, match=f"^table 'k', column 'x': .*{text}"):
        column_of('x', pd.Series(values), kind, "table 'k', ")


R = np.random.default_rng(0)
ASKED = {
    '-999': ('x', [*R.normal(5, 1, 30).round(2), -999], 'missing'), '0 among pressures': ('trestbps',
        [*R.integers(90, 180, 80), 0, 0], 'missing'),
    '99 among scores': ('x', [*R.integers(0, 9, 50), 99, 99], 'missing'), '99999': ('gain',
        [0] * 50 + [*R.integers(100, 20000, 50), 99999, 99999], 'missing'),
    'running number': ('nr', np.arange(40) + 17, 'identifier'), 'shuffled number': ('x', R.permutation(60),
        'identifier'), 'named so': ('patient_id', R.integers(0, 10**7, 20), 'identifier'),
    'zip': ('ZIP', R.integers(10000, 99999, 30), 'postal'), 'zip text': ('zip_code', ['02139', '10115'] * 9, 'postal'),
    'dates': ('x', ['2024-03-01', '2023-01-05'], 'dates such as'),
    'time': ('time', R.integers(4, 280, 30), 'known only after'), 'survival': ('overall_survival_months',
        R.integers(4, 280, 30), 'known only after'),
}
FINE = {
    'vessels': ('ca', [0, 0, 1, 2, 3] * 9), 'mostly zero': ('loss', [0] * 90 + [*R.integers(1500, 2800, 10)]),
    'ages': ('age', R.integers(0, 99, 90)), 'salaries': ('pay', 100 * R.integers(200, 900, 50)),
    'laboratory time': ('prothrombin_time', R.integers(9, 20, 30)), 'words': ('widow', ['yes', 'no'] * 20), 'few': ('x',
        [1, 2, 3]), 'negative': ('base_excess', R.integers(-9, 9, 60)), 'empty': ('x', [None] * 9),
}


@pytest.mark.parametrize('case', ASKED)
def test_what_is_asked(case):
    name, values, text = ASKED[case]
    assert text in doubt(name, pd.Series(values))
    with pytest.raises(ValueError, match=f"column '{name}': .*--drop '{name}' leaves it out, --accept '{name}'"):
        read_schema(pd.DataFrame({name: values, 'b': 1, 'y': np.arange(len(values)) % 2}), 'y')


@pytest.mark.parametrize('case', FINE)
def test_what_is_not_asked(case): assert doubt(FINE[case][0], pd.Series(FINE[case][1])) == ''


# Target and codec

def test_targets():
    assert target_of('y', pd.Series(['b', 'a', 'c'])).levels == ['a', 'b', 'c'] and target_of('y',
        pd.Series([2, 1, 5, 5])).levels == [1, 2, 5]
    assert target_of('y', pd.Series(['b', 'a']), 'a').levels == ['b', 'a'] and target_of('y', pd.Series([0, 1]),
        '0').levels == [1, 0]
    price = target_of('y', pd.Series(np.arange(50) / 4))
    assert price.kind == 'number' and price.typed([3.21]).tolist() == [3.21]
    for v in (['b', 'a'], np.arange(50) / 4):
        with pytest.raises(ValueError, match="has no class 'z'"): target_of('y', pd.Series(v), 'z')


@st.composite
def frames(draw):
    r, n = np.random.default_rng(draw(st.integers(0, 2**20))), draw(st.integers(12, 30))
    kinds = dict(x=r.normal(5, 2, n).round(2), count=r.integers(0, 40, n), flag=r.integers(0, 2, n),
                 yes=r.uniform(size=n) < .5, word=r.choice(['a', 'b', 'c'], n),
                 nullable=pd.array(r.integers(10, 90, n), dtype='Int64'),
                 day=pd.to_datetime('2020-01-01') + pd.to_timedelta(r.integers(0, 999, n), unit='D'), big=r.normal(0, 1,
                     n) * 1e30)
    t = pd.DataFrame({c: kinds[c] for c in draw(st.lists(st.sampled_from(list(kinds)), min_size=1, unique=True))})
    return t.assign(y=draw(st.sampled_from([np.arange(n) % 2, np.arange(n) % 3, r.normal(size=n)])))


@settings(max_examples=40, deadline=None)
@given(frames())
def test_there_and_back(t):
    s = read_schema(t, 'y', accept=list(t))
    codec = TableCodec(s).fit(t)
    z = codec.transform(t)
    assert np.isfinite(z).all() and abs(z).max() < 50
    np.testing.assert_allclose(codec.snap(z), z, atol=1e-9)
    back = codec.inverse_transform(z)
    for c in back:
        if c == 'big': np.testing.assert_allclose(back[c], t[c])
        else: assert back[c].tolist() == t[c].tolist()
    assert len(codec.get_feature_names_out()) == z.shape[1] and (s.classes is None) == (t.y.nunique() > 10)


def test_codec_is_that_of_sklearn():
    t = pd.DataFrame(dict(a=R.normal(3, 2, 30), b=R.choice(['u', 'v', 'w'], 30), c=R.choice(['u', 'v'], 30),
                          y=np.arange(30) % 2))
    z = TableCodec(read_schema(t, 'y')).fit(t).transform(t)
    oracle = ColumnTransformer([('n', StandardScaler(), ['a']),
                                ('c', OneHotEncoder(drop='if_binary', sparse_output=False),
                                 ['b', 'c'])]).fit_transform(t)
    np.testing.assert_allclose(z[:, 0], oracle[:, 0], atol=3e-5 * abs(z[:, 0]).max())
    np.testing.assert_array_equal(z[:, 1:], oracle[:, 1:])


@pytest.mark.parametrize('size', [1e30, 1e200, 1e-200])
def test_sizes_that_overflow(size):
    t = pd.DataFrame(dict(a=R.normal(size=20) * size, y=np.arange(20) % 2))
    codec = TableCodec(read_schema(t, 'y')).fit(t)
    assert np.isfinite(codec.scale_).all() and abs(codec.transform(t).std() - 1) < .01


def test_holes_and_unknown_levels():
    t = pd.DataFrame(dict(a=[1., 2, 4], b=['u', 'v', 'w'], y=[0, 1, 1]))
    codec = TableCodec(read_schema(t, 'y')).fit(t)
    z = codec.transform(pd.DataFrame(dict(a=[np.nan, 2], b=['u', 'x'])))
    assert np.isnan(z).tolist() == [[True, False, False, False], [False, True, True, True]]
    assert np.isnan(codec.transform(t[['b']]))[:, 0].all()
    with pytest.raises(ValueError, match="'a': got text such as 'high'"): codec.transform(pd.DataFrame({'a': ['high']}))


def test_orders_hold_in_every_row():
    t = pd.DataFrame(dict(direct=R.gamma(1, 1, 50).round(1), y=np.arange(50) % 2))
    t['total'] = (t.direct + R.gamma(1, 1, 50)).round()+1
    s = read_schema(t, 'y', order=['total >= direct', 'direct >= 0'])
    assert s.order == (('direct', 'total'),)
    back = TableCodec(s).fit(t).inverse_transform(3 * R.normal(size=(2000, 2)))
    assert (back.direct <= back.total).all() and (back.direct >= 0).all()
    free = TableCodec(Schema(s.target, s.columns)).fit(t).inverse_transform(3 * R.normal(size=(2000, 2)))
    assert (free.direct > free.total).mean() > .1
    for text, said in ('direct >= total', 'breaks it in'), ('direct < total', 'expected COLUMN'), ('direct <= x',
        'expected COLUMN'), ('1 <= 2', 'expected COLUMN'), ('direct <= 1', 'breaks it in'):
        with pytest.raises(ValueError, match=said): read_schema(t, 'y', order=[text])


def test_in_a_pipeline():
    t = three_hospitals(complete=True)['east']
    p = make_pipeline(TableCodec(read_schema(t, 'diagnosis')), LogisticRegression()).fit(t, t.diagnosis)
    assert p.score(t, t.diagnosis) > .9 and isinstance(clone(p[0]), TableCodec)


def test_schema_refuses():
    t = pd.DataFrame(dict(a=[1, 2, 3], y=[0, 1, 1]))
    for arguments, text in ((t, 'z'), "no column 'z'"), ((t, 'y', None, dict(q='category')),
                                                         "no column 'q'"), ((t[['y']], 'y'),
                                                             'no column beside the target'):
        with pytest.raises(ValueError, match=text): read_schema(*arguments)


def test_hospitals():
    a, b = three_hospitals(1), three_hospitals(2)
    assert not a['north'].equals(b['north']) and sum(map(len, b.values())) == 569
    for k, t in three_hospitals(1, complete=True).items():
        pd.testing.assert_frame_equal(t[a[k].columns].where(a[k].notna()), a[k], check_dtype=False)
    assert as_tables(a) == a and len(columns_of(a['south'], read_schema(a['south'], 'diagnosis'))) == 7
